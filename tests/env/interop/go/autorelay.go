// AutoRelay: a private host finds its way to the relay without being told to
// reserve, advertises the circuit address, and is reached at it.
package main

import (
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/p2p/host/peerstore/pstoremem"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/p2p/protocol/ping"
	ma "github.com/multiformats/go-multiaddr"
	madns "github.com/multiformats/go-multiaddr-dns"
)

// relayName stands for 127.0.0.1. AutoRelay advertises a relay under addresses
// that look public only: a loopback address does not, a name in .internal does.
const relayName = "relay.internal"

func autoRelay(relay peer.AddrInfo) error {
	_, port := ma.SplitFirst(relay.Addrs[0])
	named := peer.AddrInfo{ID: relay.ID, Addrs: []ma.Multiaddr{ma.StringCast("/dns4/" + relayName).Encapsulate(port)}}
	resolver, err := madns.NewResolver(madns.WithDefaultResolver(&madns.MockResolver{
		IP: map[string][]net.IPAddr{relayName: {{IP: net.IPv4(127, 0, 0, 1)}}},
	}))
	if err != nil {
		return err
	}
	resolve := libp2p.MultiaddrResolver(swarm.ResolverFromMaDNS{Resolver: resolver})

	// Identify replaces addresses that are only known from a dial by those that
	// the relay lists, which are loopback ones here; a permanent one it keeps.
	known, err := pstoremem.NewPeerstore()
	if err != nil {
		return err
	}
	known.AddAddrs(relay.ID, named.Addrs, peerstore.PermanentAddrTTL)

	target, err := newParty(resolve, libp2p.Peerstore(known), libp2p.ForceReachabilityPrivate(),
		libp2p.EnableAutoRelayWithStaticRelays([]peer.AddrInfo{named}))
	if err != nil {
		return err
	}
	defer target.Close()
	address, err := awaitCircuitAddress(target, relay.ID)
	if err != nil {
		return err
	}
	proved("AutoRelay reserved by itself and advertises %s", address)

	source, err := newParty(resolve)
	if err != nil {
		return err
	}
	defer source.Close()
	ctx, cancel := step()
	defer cancel()
	if err := source.Connect(ctx, peer.AddrInfo{ID: target.ID(), Addrs: []ma.Multiaddr{address}}); err != nil {
		return fmt.Errorf("connect to %s: %w", address, err)
	}
	pong := <-ping.Ping(ctx, source, target.ID())
	if pong.Error != nil {
		return fmt.Errorf("ping over the circuit: %w", pong.Error)
	}
	proved("a second host pings it through the relay in %s", pong.RTT)
	return nil
}

// discover has AutoRelay find out by identify that a host at a global address is a relay.
func discover(relay peer.AddrInfo) error {
	target, err := newParty(libp2p.ForceReachabilityPrivate(), libp2p.EnableAutoRelayWithStaticRelays([]peer.AddrInfo{relay}))
	if err != nil {
		return err
	}
	defer target.Close()
	address, err := awaitCircuitAddress(target, relay.ID)
	if err != nil {
		return err
	}
	proved("AutoRelay reserved by itself and advertises %s", address)
	return nil
}

// awaitCircuitAddress waits until the host advertises an address via the relay.
func awaitCircuitAddress(p *party, relay peer.ID) (ma.Multiaddr, error) {
	updates, err := p.EventBus().Subscribe(new(event.EvtLocalAddressesUpdated))
	if err != nil {
		return nil, err
	}
	defer updates.Close()
	viaRelay := func(a ma.Multiaddr) bool { return strings.HasSuffix(a.String(), "/p2p/"+relay.String()+"/p2p-circuit") }
	for {
		if i := slices.IndexFunc(p.Addrs(), viaRelay); i >= 0 {
			return p.Addrs()[i], nil
		}
		if _, err := await(updates.Out(), "an address via the relay, from AutoRelay"); err != nil {
			return nil, fmt.Errorf("%w; it advertises %s", err, p.Addrs())
		}
	}
}

// Fleet: several relays in one DHT, and a host behind a NAT that knows only one
// node of the DHT, which is not a relay.
package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p"
	dht "github.com/libp2p/go-libp2p-kad-dht"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/host/autorelay"
	"github.com/libp2p/go-libp2p/p2p/protocol/ping"
)

const (
	// relaysInFleet is how many relays the test starts.
	relaysInFleet = 3
	// autoRelayTag protects the connections to relays that AutoRelay holds a slot on.
	autoRelayTag = "autorelay"
	// pollInterval is used where there is no event to wait for.
	pollInterval = 50 * time.Millisecond
)

// fleet prints `bootstrap <multiaddr>`, the DHT node for the relays to join
// by; then `reserved <relay>`, the relay that the test kills next; and ends
// once the client has moved to another relay.
func fleet() error {
	node, err := newParty(libp2p.ListenAddrStrings("/ip4/127.0.0.1/tcp/0"))
	if err != nil {
		return err
	}
	defer node.Close()
	server, err := dht.New(node, dht.Mode(dht.ModeServer))
	if err != nil {
		return err
	}
	defer server.Close()
	bootstrap := peer.AddrInfo{ID: node.ID(), Addrs: node.Addrs()}
	fmt.Printf("bootstrap %s/p2p/%s\n", bootstrap.Addrs[0], bootstrap.ID)
	if err := until("the relays are in the DHT", func() bool { return server.RoutingTable().Size() == relaysInFleet }); err != nil {
		return err
	}
	proved("%d relays joined a DHT of go-libp2p, which checked that they answer", relaysInFleet)

	client, err := newWalker(bootstrap)
	if err != nil {
		return err
	}
	defer client.Close()
	first, err := client.reservedOn("")
	if err != nil {
		return err
	}
	proved("AutoRelay found %s by a walk and reserved on it", first.ID)
	if err := client.isReachedBy(first); err != nil {
		return err
	}
	fmt.Printf("reserved %s\n", first.ID)
	second, err := client.reservedOn(first.ID)
	if err != nil {
		return fmt.Errorf("after %s was killed: %w", first.ID, err)
	}
	proved("when that one was gone, AutoRelay moved to %s", second.ID)
	return client.isReachedBy(second)
}

// newWalker starts a host that finds relays in the DHT, as kubo does: those
// near its own id.
func newWalker(bootstrap peer.AddrInfo) (*party, error) {
	walks := make(chan func(context.Context, int) []peer.AddrInfo, 1)
	source := func(ctx context.Context, num int) <-chan peer.AddrInfo {
		found := make(chan peer.AddrInfo)
		go func() {
			defer close(found)
			walk := <-walks
			walks <- walk
			for _, relay := range walk(ctx, num) {
				select {
				case found <- relay:
				case <-ctx.Done():
					return
				}
			}
		}()
		return found
	}
	p, err := newParty(libp2p.ForceReachabilityPrivate(), libp2p.EnableAutoRelayWithPeerSource(source,
		autorelay.WithNumRelays(1), autorelay.WithMinCandidates(1), autorelay.WithBootDelay(0),
		autorelay.WithBackoff(time.Second), autorelay.WithMinInterval(time.Second)))
	if err != nil {
		return nil, err
	}
	table, err := dht.New(p, dht.Mode(dht.ModeClient), dht.BootstrapPeers(bootstrap))
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	walks <- func(ctx context.Context, num int) (relays []peer.AddrInfo) {
		closest, err := table.GetClosestPeers(ctx, string(p.ID()))
		if err != nil {
			return nil // it is queried again
		}
		for _, id := range closest {
			if addrs := p.Peerstore().Addrs(id); len(addrs) > 0 && len(relays) < num {
				relays = append(relays, peer.AddrInfo{ID: id, Addrs: addrs})
			}
		}
		return relays
	}
	return p, nil
}

// reservedOn waits until AutoRelay holds a slot on a relay other than except.
func (p *party) reservedOn(notOn peer.ID) (relay peer.AddrInfo, err error) {
	err = until("a slot on another relay than "+notOn.String(), func() bool {
		for _, id := range p.Network().Peers() {
			if id != notOn && p.ConnManager().IsProtected(id, autoRelayTag) {
				relay = peer.AddrInfo{ID: id, Addrs: p.Peerstore().Addrs(id)}
				return true
			}
		}
		return false
	})
	return relay, err
}

// isReachedBy has a second host ping the party through the relay.
func (p *party) isReachedBy(relay peer.AddrInfo) error {
	source, err := newParty()
	if err != nil {
		return err
	}
	defer source.Close()
	near, _, err := source.connect(relay, p)
	if err != nil {
		return err
	}
	if !isCircuit(near) {
		return fmt.Errorf("the connection is no circuit: %s", near.RemoteMultiaddr())
	}
	ctx, cancel := step()
	defer cancel()
	pong := <-ping.Ping(network.WithAllowLimitedConn(ctx, "a ping fits any limit"), source, p.ID())
	if pong.Error != nil {
		return fmt.Errorf("ping over the circuit: %w", pong.Error)
	}
	proved("a second host pings it through %s in %s", relay.ID, pong.RTT)
	return nil
}

// until polls a condition.
func until(what string, holds func() bool) error {
	for start := time.Now(); !holds(); time.Sleep(pollInterval) {
		if time.Since(start) > stepTimeout {
			return fmt.Errorf("%s: not within %s", what, stepTimeout)
		}
	}
	return nil
}

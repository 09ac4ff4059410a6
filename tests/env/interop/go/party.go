// A party is a host that takes part in a scenario: it listens on no address,
// so every connection between two parties is a circuit, and it hands its
// circuits and the streams opened to it over on channels.
package main

import (
	"context"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	tls "github.com/libp2p/go-libp2p/p2p/security/tls"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	ws "github.com/libp2p/go-libp2p/p2p/transport/websocket"
	ma "github.com/multiformats/go-multiaddr"
)

// stepTimeout is far more than any single step takes, on a busy machine too.
const stepTimeout = 180 * time.Second

// testProtocol is the protocol between parties over a circuit.
const testProtocol protocol.ID = "/relaylet-interop/1"

// securities are the secure channels that a relay has to offer, each used alone.
var securities = map[protocol.ID]libp2p.Option{
	noise.ID: libp2p.Security(noise.ID, noise.New),
	tls.ID:   libp2p.Security(tls.ID, tls.New),
}

type party struct {
	host.Host
	opened, closed chan network.Conn   // circuits, not the connection to the relay
	streams        chan network.Stream // opened by the other party, of testProtocol
}

func newParty(options ...libp2p.Option) (*party, error) {
	h, err := libp2p.New(append([]libp2p.Option{
		libp2p.NoListenAddrs,
		libp2p.EnableRelay(), // NoListenAddrs turns it off otherwise
		libp2p.Transport(tcp.NewTCPTransport),
		libp2p.Transport(ws.New),
	}, options...)...)
	if err != nil {
		return nil, fmt.Errorf("start a host: %w", err)
	}
	p := &party{h, make(chan network.Conn, 16), make(chan network.Conn, 16), make(chan network.Stream, 16)}
	h.Network().Notify(&network.NotifyBundle{
		ConnectedF: func(_ network.Network, c network.Conn) {
			if isCircuit(c) {
				p.opened <- c
			}
		},
		DisconnectedF: func(_ network.Network, c network.Conn) {
			if isCircuit(c) {
				p.closed <- c
			}
		},
	})
	h.SetStreamHandler(testProtocol, func(s network.Stream) { p.streams <- s })
	return p, nil
}

func isCircuit(c network.Conn) bool {
	_, err := c.RemoteMultiaddr().ValueForProtocol(ma.P_CIRCUIT)
	return err == nil
}

// newReserved starts a party that holds a reservation.
func newReserved(relay peer.AddrInfo, options ...libp2p.Option) (*party, error) {
	p, err := newParty(options...)
	if err != nil {
		return nil, err
	}
	if _, err := p.reserve(relay); err != nil {
		p.Close()
		return nil, fmt.Errorf("reserve: %w", err)
	}
	return p, nil
}

func (p *party) reserve(relay peer.AddrInfo) (*client.Reservation, error) {
	ctx, cancel := step()
	defer cancel()
	return client.Reserve(ctx, p, relay)
}

// connect opens a circuit to the target and returns both of its ends.
func (p *party) connect(relay peer.AddrInfo, target *party) (near, far network.Conn, err error) {
	if err := p.dial(relay, target.ID()); err != nil {
		return nil, nil, err
	}
	if near, err = await(p.opened, "the circuit at the source"); err != nil {
		return nil, nil, err
	}
	far, err = await(target.opened, "the circuit at the target")
	return near, far, err
}

func (p *party) dial(relay peer.AddrInfo, target peer.ID) error {
	relays, err := peer.AddrInfoToP2pAddrs(&relay)
	if err != nil {
		return err
	}
	ctx, cancel := step()
	defer cancel()
	circuit := relays[0].Encapsulate(ma.StringCast("/p2p-circuit"))
	return p.Connect(ctx, peer.AddrInfo{ID: target, Addrs: []ma.Multiaddr{circuit}})
}

// connectionToRelay is the one connection that the party has to the relay.
func (p *party) connectionToRelay(relay peer.AddrInfo) (network.Conn, error) {
	connections := p.Network().ConnsToPeer(relay.ID)
	if len(connections) != 1 {
		return nil, fmt.Errorf("%d connections to the relay instead of one", len(connections))
	}
	return connections[0], nil
}

// step bounds one step of a scenario.
func step() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), stepTimeout)
}

// await receives a value that another goroutine or host is about to send.
func await[T any](from <-chan T, what string) (T, error) {
	select {
	case value := <-from:
		return value, nil
	case <-time.After(stepTimeout):
		var none T
		return none, fmt.Errorf("%s: nothing within %s", what, stepTimeout)
	}
}

// AutoNAT: a host that listens on port 4001 learns from the relays whether it
// is reachable there, in both versions of the protocol.
package main

import (
	"fmt"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	ma "github.com/multiformats/go-multiaddr"
)

// timeout covers go-libp2p's delays: 15 s before its first probe, and in
// version 1 up to 90 s between probes.
const timeout = 3 * time.Minute

func learns(wanted network.Reachability) func(peer.AddrInfo) error {
	return func(first peer.AddrInfo) error {
		relays := append([]peer.AddrInfo{first}, others...)
		if err := learnsOverVersion1(relays, wanted); err != nil {
			return fmt.Errorf("version 1: %w", err)
		}
		if err := learnsOverVersion2(relays, wanted); err != nil {
			return fmt.Errorf("version 2: %w", err)
		}
		return nil
	}
}

// learnsItIsPrivate runs a host without a global address: its request names no address, which only version 1 allows.
func learnsItIsPrivate(first peer.AddrInfo) error {
	return learnsOverVersion1(append([]peer.AddrInfo{first}, others...), network.ReachabilityPrivate)
}

func learnsOverVersion1(relays []peer.AddrInfo, wanted network.Reachability) error {
	h, err := listening()
	if err != nil {
		return err
	}
	defer h.Close()
	learnt, err := h.EventBus().Subscribe(new(event.EvtLocalReachabilityChanged))
	if err != nil {
		return err
	}
	defer learnt.Close()
	if err := connectToAll(h, relays); err != nil {
		return err
	}
	deadline := time.After(timeout)
	for {
		select {
		case told := <-learnt.Out():
			switch is := told.(event.EvtLocalReachabilityChanged).Reachability; is {
			case wanted:
				proved("version 1: it is %s", is)
				return nil
			case network.ReachabilityUnknown:
			default:
				return fmt.Errorf("it is %s", is)
			}
		case <-deadline:
			return fmt.Errorf("nothing learnt within %s", timeout)
		}
	}
}

func learnsOverVersion2(relays []peer.AddrInfo, wanted network.Reachability) error {
	h, err := listening(libp2p.EnableAutoNATv2())
	if err != nil {
		return err
	}
	defer h.Close()
	learnt, err := h.EventBus().Subscribe(new(event.EvtHostReachableAddrsChanged))
	if err != nil {
		return err
	}
	defer learnt.Close()
	if err := connectToAll(h, relays); err != nil {
		return err
	}
	port := func(a ma.Multiaddr) bool {
		port, err := a.ValueForProtocol(ma.P_TCP)
		return err == nil && port == "4001"
	}
	deadline := time.After(timeout)
	for {
		select {
		case told := <-learnt.Out():
			addresses := told.(event.EvtHostReachableAddrsChanged)
			right, wrong := addresses.Reachable, addresses.Unreachable
			if wanted == network.ReachabilityPrivate {
				right, wrong = wrong, right
			}
			if len(wrong) > 0 {
				return fmt.Errorf("reachable are %s, unreachable %s", addresses.Reachable, addresses.Unreachable)
			}
			if slices.ContainsFunc(right, port) {
				proved("version 2: %s is %s", right, wanted)
				return nil
			}
		case <-deadline:
			return fmt.Errorf("nothing learnt within %s", timeout)
		}
	}
}

// listening starts a host that listens on all addresses of the machine.
func listening(options ...libp2p.Option) (host.Host, error) {
	return libp2p.New(append([]libp2p.Option{
		libp2p.ListenAddrStrings("/ip4/0.0.0.0/tcp/4001"),
		libp2p.Transport(tcp.NewTCPTransport),
	}, options...)...)
}

func connectToAll(h host.Host, relays []peer.AddrInfo) error {
	for _, relay := range relays {
		ctx, cancel := step()
		err := h.Connect(ctx, relay)
		cancel()
		if err != nil {
			return err
		}
	}
	return nil
}

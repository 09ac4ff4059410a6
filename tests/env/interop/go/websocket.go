// WebSocket: a reservation over it, and circuits between it and TCP.
package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

func websocket(relay peer.AddrInfo) error {
	if len(relay.Addrs) != 2 {
		return errors.New("it takes two addresses of the relay")
	}
	overTCP := peer.AddrInfo{ID: relay.ID, Addrs: relay.Addrs[:1]}
	overWebSocket := peer.AddrInfo{ID: relay.ID, Addrs: relay.Addrs[1:]}
	for security, only := range securities {
		for _, ends := range [][2]peer.AddrInfo{{overTCP, overWebSocket}, {overWebSocket, overTCP}, {overWebSocket, overWebSocket}} {
			target, err := newParty(only)
			if err != nil {
				return err
			}
			defer target.Close()
			reservation, err := target.reserve(ends[1])
			if err != nil {
				return fmt.Errorf("reserve over %s, %s: %w", ends[1].Addrs, security, err)
			}
			if err := checkReservation(reservation, relay.ID, target.ID()); err != nil {
				return fmt.Errorf("reservation over %s, %s: %w", ends[1].Addrs, security, err)
			}
			if !listed(reservation.Addrs, relay) {
				return fmt.Errorf("the reservation lists %s, not %s", reservation.Addrs, relay.Addrs)
			}
			source, err := newParty(only)
			if err != nil {
				return err
			}
			defer source.Close()
			if _, _, err := source.connect(ends[0], target); err != nil {
				return fmt.Errorf("circuit from %s to %s, %s: %w", ends[0].Addrs, ends[1].Addrs, security, err)
			}
			for i, end := range []*party{source, target} {
				if err := end.reached(relay, ends[i].Addrs[0]); err != nil {
					return err
				}
			}
			took, err := exchange(source, target, bulk)
			if err != nil {
				return fmt.Errorf("64 MiB each way from %s to %s, %s: %w", ends[0].Addrs, ends[1].Addrs, security, err)
			}
			proved("64 MiB each way at once from %s to %s over %s: %.1f MB/s each way",
				kind(ends[0].Addrs[0]), kind(ends[1].Addrs[0]), security, bulk/1e6/took.Seconds())
		}
	}
	return nil
}

// listed returns whether a reservation lists all addresses of the relay.
func listed(addresses []ma.Multiaddr, relay peer.AddrInfo) bool {
	wanted, err := peer.AddrInfoToP2pAddrs(&relay)
	for _, address := range wanted {
		if !ma.Contains(addresses, address) {
			return false
		}
	}
	return err == nil
}

// reached checks at which address the party is connected to the relay.
func (p *party) reached(relay peer.AddrInfo, address ma.Multiaddr) error {
	connection, err := p.connectionToRelay(relay)
	if err != nil {
		return err
	}
	if used := connection.RemoteMultiaddr(); !used.Equal(address) {
		return fmt.Errorf("the relay was reached at %s, not %s", used, address)
	}
	return nil
}

func kind(address ma.Multiaddr) string {
	if strings.HasSuffix(address.String(), "/ws") {
		return "WebSocket"
	}
	return "TCP"
}

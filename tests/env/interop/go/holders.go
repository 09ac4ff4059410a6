// Holders: many hosts that hold slots and otherwise do what go-libp2p does by
// itself, while the test does something to their network or their CPU time.
package main

import (
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
)

// holders prints `reserved` once all hosts hold a slot. When standard input
// ends, it prints `lost` and how many connections to the relay ended meanwhile,
// whichever side closed them, and `refused` and how often a host was refused.
func holders(relay peer.AddrInfo) error {
	attempts := make(chan error, 16)
	var lost, refused atomic.Int64
	closeAll, err := holdSlots(relay, attempts, func(p *party) {
		p.Network().Notify(&network.NotifyBundle{
			DisconnectedF: func(network.Network, network.Conn) { lost.Add(1) },
		})
	})
	defer closeAll()
	if err != nil {
		return err
	}
	go func() {
		for err := range attempts {
			if err != nil {
				refused.Add(1)
			}
		}
	}()
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	fmt.Println("lost", lost.Load())
	fmt.Println("refused", refused.Load())
	return nil
}

// newcomersAtATime is how many newcomers ask for a slot at a time.
const newcomersAtATime = 4

// newcomers has hosts without a slot ask for one every two seconds, and in
// place of each that is granted one another. When standard input ends, it
// prints `granted` and how many were.
func newcomers(relay peer.AddrInfo) error {
	var granted atomic.Int64
	for range newcomersAtATime {
		go func() {
			for {
				p, err := newParty()
				if err != nil {
					return
				}
				for _, err := p.reserve(relay); err != nil; _, err = p.reserve(relay) {
					time.Sleep(2 * time.Second)
				}
				granted.Add(1)
			}
		}()
	}
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	fmt.Println("granted", granted.Load())
	return nil
}

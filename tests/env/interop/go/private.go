// A private network: hosts with its key are served, others cannot connect.
package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/pnet"
)

func private(relay peer.AddrInfo) error {
	file, err := os.Open(os.Getenv("SWARM_KEY"))
	if err != nil {
		return err
	}
	defer file.Close()
	key, err := pnet.DecodeV1PSK(file)
	if err != nil {
		return fmt.Errorf("read the key: %w", err)
	}
	another := make(pnet.PSK, len(key))
	if _, err := rand.Read(another); err != nil {
		return err
	}

	for name, option := range map[string]libp2p.Option{
		"another key": libp2p.PrivateNetwork(another),
		"no key":      libp2p.ChainOptions(),
	} {
		stranger, err := newParty(option)
		if err != nil {
			return err
		}
		defer stranger.Close()
		ctx, cancel := step()
		defer cancel()
		if stranger.Connect(ctx, relay) == nil {
			return errors.New("a host with " + name + " is connected")
		}
		proved("a host with %s cannot connect", name)
	}

	for security, only := range securities {
		target, err := newReserved(relay, only, libp2p.PrivateNetwork(key))
		if err != nil {
			return err
		}
		defer target.Close()
		source, err := newParty(only, libp2p.PrivateNetwork(key))
		if err != nil {
			return err
		}
		defer source.Close()
		if _, _, err := source.connect(relay, target); err != nil {
			return fmt.Errorf("connect over %s: %w", security, err)
		}
		proved("with the key: a reservation and a circuit over %s", security)
	}
	return nil
}

// Reservations: the contents of a granted one, its renewal, and a full table.
package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/pb"
	ma "github.com/multiformats/go-multiaddr"
)

const (
	// longestTerm is the hour that a reservation lasts, and some seconds for rounding.
	longestTerm = time.Hour + 5*time.Second
	// takeover is the time within which a newcomer has to get the slot of a peer that left.
	takeover = 10 * time.Second
)

func reserveAndRenew(relay peer.AddrInfo) error {
	for security, only := range securities {
		p, err := newParty(only)
		if err != nil {
			return err
		}
		defer p.Close()

		first, err := p.reserve(relay)
		if err != nil {
			return fmt.Errorf("reserve over %s: %w", security, err)
		}
		if err := checkReservation(first, relay.ID, p.ID()); err != nil {
			return fmt.Errorf("reservation over %s: %w", security, err)
		}
		connection, err := p.connectionToRelay(relay)
		if err != nil {
			return fmt.Errorf("reserve over %s: %w", security, err)
		}
		if used := connection.ConnState().Security; used != security {
			return fmt.Errorf("the connection uses %q, not %s", used, security)
		}
		proved("reserve over %s: %s left, limits %s and %d bytes, addresses %s", security,
			time.Until(first.Expiration).Round(time.Second), first.LimitDuration, first.LimitData, first.Addrs)

		second, err := p.reserve(relay)
		if err != nil {
			return fmt.Errorf("renew over %s: %w", security, err)
		}
		if err := checkReservation(second, relay.ID, p.ID()); err != nil {
			return fmt.Errorf("renewed reservation over %s: %w", security, err)
		}
		if second.Expiration.Before(first.Expiration) {
			return fmt.Errorf("renewal over %s shortens the term: from %s to %s", security, first.Expiration, second.Expiration)
		}
		if again, err := p.connectionToRelay(relay); err != nil || again != connection {
			return fmt.Errorf("renewal over %s did not stay on the one connection: %v", security, err)
		}
		proved("renew over %s, on the same connection", security)
	}
	return reserveWithRSA(relay)
}

// reserveWithRSA reserves as old nodes do, whose identity is an RSA key.
func reserveWithRSA(relay peer.AddrInfo) error {
	for _, bits := range []int{2048, 4096} {
		key, _, err := crypto.GenerateKeyPair(crypto.RSA, bits)
		if err != nil {
			return err
		}
		for security, only := range securities {
			p, err := newReserved(relay, only, libp2p.Identity(key))
			if err != nil {
				return fmt.Errorf("reserve over %s with RSA of %d bits: %w", security, bits, err)
			}
			p.Close()
			proved("reserve over %s with RSA of %d bits", security, bits)
		}
	}
	return nil
}

// checkReservation checks what go-libp2p's client does not: the client has
// verified only the voucher's signature.
func checkReservation(r *client.Reservation, relay, self peer.ID) error {
	if left := time.Until(r.Expiration); left <= 0 || left > longestTerm {
		return fmt.Errorf("expires in %s", left)
	}
	if r.Voucher == nil {
		return errors.New("no voucher")
	}
	if r.Voucher.Relay != relay || r.Voucher.Peer != self {
		return fmt.Errorf("the voucher is from %s for %s", r.Voucher.Relay, r.Voucher.Peer)
	}
	if apart := r.Voucher.Expiration.Sub(r.Expiration).Abs(); apart > time.Second {
		return fmt.Errorf("the voucher's expiration is %s off", apart)
	}
	if len(r.Addrs) == 0 {
		return errors.New("no addresses")
	}
	for _, address := range r.Addrs {
		if _, id := peer.SplitAddr(address); id != relay {
			return fmt.Errorf("address %s does not end in /p2p/%s", address, relay)
		}
		if _, err := address.ValueForProtocol(ma.P_CIRCUIT); err == nil {
			return fmt.Errorf("address %s holds /p2p-circuit", address)
		}
	}
	return nil
}

func full(relay peer.AddrInfo) error {
	holder, err := newReserved(relay)
	if err != nil {
		return err
	}
	defer holder.Close()
	newcomer, err := newParty()
	if err != nil {
		return err
	}
	defer newcomer.Close()

	if _, err := newcomer.reserve(relay); !isRefused(err) {
		return fmt.Errorf("reserve in a full table: RESERVATION_REFUSED expected, got %v", err)
	}
	proved("a newcomer to a full table gets RESERVATION_REFUSED")

	if _, err := holder.reserve(relay); err != nil {
		return fmt.Errorf("renew in a full table: %w", err)
	}
	proved("the holder renews in the full table")

	left := time.Now()
	if err := holder.Close(); err != nil {
		return fmt.Errorf("close the holder: %w", err)
	}
	// The relay cannot notify the newcomer when the slot is free, so it polls.
	retry := time.NewTicker(100 * time.Millisecond)
	defer retry.Stop()
	for {
		_, err := newcomer.reserve(relay)
		if err == nil {
			break
		}
		if !isRefused(err) || time.Since(left) > takeover {
			return fmt.Errorf("reserve %s after the holder left: %w", time.Since(left), err)
		}
		<-retry.C
	}
	proved("the newcomer has the slot %s after the holder left", time.Since(left).Round(time.Millisecond))
	return nil
}

func isRefused(err error) bool {
	var failed client.ReservationError
	return errors.As(err, &failed) && failed.Status == pb.Status_RESERVATION_REFUSED
}

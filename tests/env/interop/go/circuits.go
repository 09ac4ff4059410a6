// Circuits without limits, as go-libp2p uses them: each carries a secured and
// multiplexed connection.
package main

import (
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
)

const (
	bulk = 64 * mib // in each direction
	// bulkTimeout leaves room for a relay built without optimisation.
	bulkTimeout = 5 * time.Minute
)

func unlimited(relay peer.AddrInfo) error {
	for security, only := range securities {
		target, err := newReserved(relay, only)
		if err != nil {
			return err
		}
		defer target.Close()
		source, err := newParty(only)
		if err != nil {
			return err
		}
		defer source.Close()
		near, far, err := source.connect(relay, target)
		if err != nil {
			return fmt.Errorf("circuit over %s: %w", security, err)
		}
		if near.Stat().Limited || far.Stat().Limited {
			return fmt.Errorf("circuit over %s is marked limited (source %t, target %t)", security, near.Stat().Limited, far.Stat().Limited)
		}
		took, err := exchange(source, target, bulk)
		if err != nil {
			return fmt.Errorf("64 MiB each way over %s: %w", security, err)
		}
		proved("64 MiB each way at once over %s, unlimited at both ends: %.1f MB/s each way", security, bulk/1e6/took.Seconds())
	}
	return nil
}

// device is what a small device has to do, built without TLS and without much memory.
func device(relay peer.AddrInfo) error {
	only := securities[noise.ID]
	target, err := newReserved(relay, only)
	if err != nil {
		return err
	}
	defer target.Close()
	source, err := newParty(only)
	if err != nil {
		return err
	}
	defer source.Close()
	if _, _, err := source.connect(relay, target); err != nil {
		return fmt.Errorf("circuit: %w", err)
	}
	const some = 4 * mib
	took, err := exchange(source, target, some)
	if err != nil {
		return fmt.Errorf("4 MiB each way: %w", err)
	}
	proved("4 MiB each way at once: %.1f MB/s each way", some/1e6/took.Seconds())
	return nil
}

// exchange sends bulk bytes in both directions at once, on an ordinary stream, and
// closes each direction separately.
func exchange(source, target *party, bulk int64) (time.Duration, error) {
	ctx, cancel := step()
	defer cancel()
	start := time.Now()
	near, err := source.NewStream(ctx, target.ID(), testProtocol)
	if err != nil {
		return 0, fmt.Errorf("open a stream: %w", err)
	}
	defer near.Reset()
	near.SetDeadline(start.Add(bulkTimeout))

	const there, back = 1, 2 // seeds
	const tasks = 4
	done := make(chan error, tasks)
	go func() { done <- named("source", sendAll(near, there, bulk)) }()
	go func() { done <- named("source", receiveAll(near, back, bulk)) }()
	// The target learns of the stream with the first bytes on it.
	far, err := await(target.streams, "the stream at the target")
	if err != nil {
		return 0, err
	}
	defer far.Reset()
	far.SetDeadline(start.Add(bulkTimeout))
	go func() { done <- named("target", sendAll(far, back, bulk)) }()
	go func() { done <- named("target", receiveAll(far, there, bulk)) }()
	for range tasks {
		if err := <-done; err != nil { // the deadlines bound this
			return 0, err
		}
	}
	return time.Since(start), nil
}

func named(end string, err error) error {
	if err != nil {
		err = fmt.Errorf("%s: %w", end, err)
	}
	return err
}

// Circuits with limits: what go-libp2p reports about them, and what the relay does
// when they are reached.
package main

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
)

const (
	// The limits that the relay was started with.
	limitBytes    = 128 * kib
	limitDuration = 5 * time.Second
	// An idle circuit closes between these two: the limit, with tolerance for a busy machine.
	soonestClose, latestClose = 4 * time.Second, 15 * time.Second
)

func limited(relay peer.AddrInfo) error {
	target, err := newReserved(relay)
	if err != nil {
		return err
	}
	defer target.Close()
	if err := bytesLimit(relay, target); err != nil {
		return fmt.Errorf("limit on bytes: %w", err)
	}
	if err := timeLimit(relay, target); err != nil {
		return fmt.Errorf("limit on time: %w", err)
	}
	return nil
}

func bytesLimit(relay peer.AddrInfo, target *party) error {
	source, err := newParty()
	if err != nil {
		return err
	}
	defer source.Close()
	near, far, err := source.connect(relay, target)
	if err != nil {
		return err
	}
	for _, end := range []network.Conn{near, far} {
		stat := end.Stat()
		data, duration := stat.Extra[client.StatLimitData], stat.Extra[client.StatLimitDuration]
		if !stat.Limited || data != uint64(limitBytes) || duration != limitDuration {
			return fmt.Errorf("an end of the circuit has limited %t, bytes %v, duration %v", stat.Limited, data, duration)
		}
	}
	proved("both ends know the circuit as limited to %d bytes and %s", limitBytes, limitDuration)

	ctx, cancel := step()
	defer cancel()
	// On the connection itself: for a stream to the peer, the host would wait for a direct connection.
	if _, err := near.NewStream(ctx); !errors.Is(err, network.ErrLimitedConn) {
		return fmt.Errorf("an ordinary stream was not refused: %v", err)
	}
	proved("an ordinary stream on it is refused")

	sender, err := source.NewStream(network.WithAllowLimitedConn(ctx, "test"), target.ID(), testProtocol)
	if err != nil {
		return fmt.Errorf("open a stream that allows limits: %w", err)
	}
	defer sender.Reset()
	passed, err := pushPastLimit(sender, target)
	if err != nil {
		return err
	}
	proved("the circuit broke when more than the limit was pushed; %d bytes of the stream arrived intact", passed)
	return awaitClosed(source, target)
}

// pushPastLimit sends half of the limit, which has to arrive, and then far
// more than the limit; it returns how many bytes arrived.
func pushPastLimit(sender network.Stream, target *party) (int64, error) {
	const half, seed = limitBytes / 2, 3
	out, in := payload(seed), payload(seed)
	sender.SetDeadline(time.Now().Add(stepTimeout))
	if err := send(sender, out, half); err != nil {
		return 0, err
	}
	receiver, err := await(target.streams, "the stream at the target")
	if err != nil {
		return 0, err
	}
	defer receiver.Reset()
	receiver.SetDeadline(time.Now().Add(stepTimeout))
	if _, err := receive(io.LimitReader(receiver, half), in); err != nil {
		return 0, fmt.Errorf("half of the limit: %w", err)
	}

	sent := make(chan error, 1)
	go func() { sent <- send(sender, out, 2*limitBytes) }()
	more, err := receive(receiver, in)
	switch {
	case err == nil:
		return 0, errors.New("the stream past the limit ended like a finished one")
	case errors.Is(err, errWrong) || isTimeout(err):
		return 0, err
	case half+more > limitBytes:
		return 0, fmt.Errorf("%d bytes passed: %w", half+more, err)
	}
	if err := <-sent; isTimeout(err) { // or none: the window has room for all of it
		return 0, fmt.Errorf("the sender was left waiting: %w", err)
	}
	return half + more, nil
}

func isTimeout(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.As(err, &timeout) && timeout.Timeout()
}

func timeLimit(relay peer.AddrInfo, target *party) error {
	source, err := newParty()
	if err != nil {
		return err
	}
	defer source.Close()
	start := time.Now()
	if _, _, err := source.connect(relay, target); err != nil {
		return err
	}
	if err := awaitClosed(source, target); err != nil {
		return err
	}
	if took := time.Since(start); took < soonestClose || took > latestClose {
		return fmt.Errorf("an idle circuit closed after %s", took)
	}
	proved("an idle circuit closed after %s", time.Since(start).Round(10*time.Millisecond))
	return nil
}

// awaitClosed waits until both ends have seen their circuit end.
func awaitClosed(ends ...*party) error {
	for _, end := range ends {
		if _, err := await(end.closed, "the end of the circuit"); err != nil {
			return err
		}
	}
	return nil
}

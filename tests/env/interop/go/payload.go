// The bytes that cross a circuit: pseudo-random from a seed, so that either
// end can produce them and check them byte for byte without holding them all.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"

	"github.com/libp2p/go-libp2p/core/network"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	// chunk is written at once; small against the least limit under test.
	chunk = 4 * kib
)

func payload(seed byte) io.Reader { return rand.NewChaCha8([32]byte{seed}) }

var errWrong = errors.New("a wrong byte")

// send writes n bytes of a payload.
func send(s network.Stream, bytes io.Reader, n int64) error {
	written, err := io.CopyBuffer(struct{ io.Writer }{s}, io.LimitReader(bytes, n), make([]byte, chunk))
	if err != nil {
		return fmt.Errorf("send: after %d of %d bytes: %w", written, n, err)
	}
	return nil
}

// receive reads until the other end closes and checks every byte; it returns
// how many there were. An error after correct bytes wraps the stream's error.
func receive(s io.Reader, expected io.Reader) (n int64, err error) {
	got, want := make([]byte, 64*kib), make([]byte, 64*kib)
	for {
		k, err := s.Read(got)
		io.ReadFull(expected, want[:k]) // a seeded generator has no end and no errors
		if !bytes.Equal(got[:k], want[:k]) {
			return n, fmt.Errorf("receive: %w within %d bytes after the first %d", errWrong, k, n)
		}
		n += int64(k)
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, fmt.Errorf("receive: after %d bytes: %w", n, err)
		}
	}
}

// sendAll sends n bytes and then closes the write half only.
func sendAll(s network.Stream, seed byte, n int64) error {
	if err := send(s, payload(seed), n); err != nil {
		return err
	}
	return s.CloseWrite()
}

// receiveAll expects exactly n bytes and the end of the stream behind them.
func receiveAll(s network.Stream, seed byte, n int64) error {
	got, err := receive(s, payload(seed))
	if err == nil && got != n {
		err = fmt.Errorf("receive: end of stream after %d bytes instead of %d", got, n)
	}
	return err
}

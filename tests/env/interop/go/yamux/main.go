// One end of a raw yamux session: go-yamux, as go-libp2p sets it up, against the relay's.
//
//	go run ./yamux <address> client|server <seed> <streams>
//
// Opens that many streams and answers as many; tests/env/interop/yamux.rs describes their contents. Prints "done" once all
// have ended as expected, and waits for the session to end; prints a failure in one line.
package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"time"

	mux "github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-yamux/v5"
)

const (
	kib = 1 << 10
	// timeout is far more than a stream takes, even on a busy machine.
	timeout = 3 * time.Minute
)

// How a stream ends.
const (
	both     = iota // both sides write at once and finish
	late            // the acceptor writes only after the opener's end
	cut             // the opener resets it
	refuse          // the acceptor resets it
	enough          // the opener finishes, reads half of the answer, and resets it
	outcomes        // the number of outcomes
)

// plan is the header of a stream.
type plan struct {
	Seed, There, Back uint32
	Outcome, Slow     uint8 // Slow: how many milliseconds readers wait now and then
	Piece             uint16
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "failed: yamux:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 4 {
		return errors.New("usage: yamux <address> client|server <seed> <streams>")
	}
	seed, err := strconv.ParseUint(args[2], 10, 64)
	if err != nil {
		return err
	}
	streams, err := strconv.Atoi(args[3])
	if err != nil {
		return err
	}
	conn, err := net.Dial("tcp", args[0])
	if err != nil {
		return err
	}
	start := yamux.Server
	if args[1] == "client" {
		start = yamux.Client
	}
	session, err := start(conn, mux.DefaultTransport.Config(), nil)
	if err != nil {
		return err
	}
	random := rand.New(rand.NewPCG(seed, 1))
	done := make(chan error)
	go func() {
		for range streams {
			stream, err := session.AcceptStream()
			if err != nil {
				done <- fmt.Errorf("accept: %w", err)
				return
			}
			go func() { done <- answer(stream) }()
		}
	}()
	go func() {
		atOnce := make(chan struct{}, 1+random.IntN(24))
		for range streams {
			atOnce <- struct{}{}
			p := aPlan(random)
			if random.IntN(4) == 0 {
				if _, err := session.Ping(); err != nil {
					done <- fmt.Errorf("ping: %w", err)
					return
				}
			}
			stream, err := session.OpenStream(context.Background())
			if err != nil {
				done <- fmt.Errorf("open: %w", err)
				return
			}
			go func() {
				err := ask(stream, p)
				<-atOnce
				done <- err
			}()
		}
	}()
	for range 2 * streams {
		if err := <-done; err != nil {
			return err
		}
	}
	fmt.Println("done")
	// The other side ends the session with a normal go-away.
	if _, err := session.AcceptStream(); !errors.Is(err, yamux.ErrRemoteGoAway) {
		return fmt.Errorf("the session's end: %w", err)
	}
	return nil
}

func aPlan(random *rand.Rand) plan {
	size := func() uint32 {
		most := []int{1, 20, 20 * kib, 100 * kib, 500 * kib}[random.IntN(5)]
		return uint32(random.IntN(most))
	}
	return plan{
		random.Uint32(), size(), size(),
		uint8(random.IntN(outcomes)), uint8(max(0, random.IntN(12)-8)),
		uint16(1 + random.IntN([]int{kib, 60 * kib}[random.IntN(2)])),
	}
}

// ask is the opener's side of a stream.
func ask(stream *yamux.Stream, p plan) error {
	defer stream.Reset() // has no effect after both ends
	stream.SetDeadline(time.Now().Add(timeout))
	wrote := make(chan error, 1)
	go func() {
		var header bytes.Buffer
		binary.Write(&header, binary.BigEndian, p)
		if _, err := stream.Write(header.Bytes()); err != nil {
			wrote <- err
			return
		}
		wrote <- send(stream, p.Seed, p.There, p.Piece, p.Outcome != cut)
	}()
	switch p.Outcome {
	case both, late:
		return p.failed("ask", errors.Join(whole(receive(stream, ^p.Seed, p.Back, p)), <-wrote))
	case cut:
		return p.failed("ask", <-wrote)
	case refuse:
		return p.failed("ask", broken(receive(stream, ^p.Seed, p.Back, p)))
	default:
		half := io.LimitReader(stream, int64(p.Back/2))
		return p.failed("ask", errors.Join(whole(receive(half, ^p.Seed, p.Back/2, p)), <-wrote))
	}
}

// answer is the acceptor's side.
func answer(stream *yamux.Stream) error {
	defer stream.Reset()
	stream.SetDeadline(time.Now().Add(timeout))
	var p plan
	if err := binary.Read(stream, binary.BigEndian, &p); err != nil {
		// A stream that is reset right after its header is never read: go-yamux drops the data.
		if errors.Is(err, yamux.ErrStreamReset) {
			return nil
		}
		return fmt.Errorf("the header of a stream: %w", err)
	}
	wrote := make(chan error, 1)
	write := func() { wrote <- send(stream, ^p.Seed, p.Back, p.Piece, p.Outcome != refuse) }
	switch p.Outcome {
	case late:
		if err := whole(receive(stream, p.Seed, p.There, p)); err != nil {
			return p.failed("answer", err)
		}
		write()
		return p.failed("answer", <-wrote)
	case refuse:
		write()
		return p.failed("answer", <-wrote)
	}
	go write()
	n, err := receive(stream, p.Seed, p.There, p)
	switch p.Outcome {
	case both:
		return p.failed("answer", errors.Join(whole(n, err), <-wrote))
	case cut:
		return p.failed("answer", broken(n, err))
	default:
		if err != nil {
			return p.failed("answer", broken(n, err))
		}
		<-wrote // it may have been reset
		return p.failed("answer", whole(n, err))
	}
}

func (p plan) failed(what string, err error) error {
	if err != nil {
		err = fmt.Errorf("%s %+v: %w", what, p, err)
	}
	return err
}

var errShort = errors.New("an end before the last byte")

// receive reads to the end. Returns an error if there is none, and how many bytes are missing.
func receive(from io.Reader, seed, count uint32, p plan) (missing uint32, err error) {
	least := 1
	if p.Slow > 0 {
		least = 8 * kib
	}
	buffer := make([]byte, least+int(p.Seed%(40*kib)))
	expected := payload(seed)
	for read := uint32(0); ; {
		n, err := from.Read(buffer)
		for at, b := range buffer[:n] {
			if b != expected() {
				return 0, fmt.Errorf("a wrong byte at %d", int(read)+at)
			}
		}
		read += uint32(n)
		if read > count {
			return 0, fmt.Errorf("%d bytes instead of %d", read, count)
		}
		if err != nil {
			if err == io.EOF {
				err = nil
			}
			return count - read, err
		}
		if p.Slow > 0 {
			time.Sleep(time.Duration(p.Slow) * time.Millisecond)
		}
	}
}

// whole expects all bytes and the end of the stream.
func whole(missing uint32, err error) error {
	if err == nil && missing > 0 {
		return fmt.Errorf("%w: %d are missing", errShort, missing)
	}
	return err
}

// broken expects a reset after some of the bytes.
func broken(missing uint32, err error) error {
	switch {
	case err == nil:
		return fmt.Errorf("a reset looks like an end, with %d bytes missing", missing)
	case errors.Is(err, yamux.ErrStreamReset):
		return nil
	}
	return err
}

func send(to *yamux.Stream, seed, count uint32, piece uint16, ends bool) error {
	next := payload(seed)
	for left := int(count); left > 0; {
		bytes := make([]byte, min(left, int(piece)))
		for at := range bytes {
			bytes[at] = next()
		}
		if _, err := to.Write(bytes); err != nil {
			return err
		}
		left -= len(bytes)
	}
	if ends {
		return to.CloseWrite()
	}
	return nil
}

// payload are the bytes of a seed, one by one.
func payload(seed uint32) func() byte {
	return func() byte {
		seed = seed*1664525 + 1013904223
		return byte(seed >> 24)
	}
}

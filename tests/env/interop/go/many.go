// Many concurrent circuits between two parties, each transferring data in both directions as fast as it can.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/pb"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/proto"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/util"
)

// period is the number of bytes after which a payload repeats: a prime, so that a lost, duplicated or moved
// part is noticed.
const period = 65521

// transfer is how much was sent and received on one circuit.
type transfer struct {
	circuit        byte
	sent, received int64
	err            error
}

// many is one party: `many <relay> <circuits> <seconds> [<target>]`. Without a target it reserves, prints its peer id
// and accepts circuits. tests/env/interop/many.rs describes the bytes that they transfer.
func many(args []string) error {
	relay, err := peer.AddrInfoFromString(args[0])
	if err != nil {
		return err
	}
	circuits, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	seconds, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	lasts := time.Duration(seconds) * time.Second
	p, err := newParty()
	if err != nil {
		return err
	}
	defer p.Close()
	ctx, cancel := step()
	defer cancel()
	if err := p.Connect(ctx, *relay); err != nil {
		return err
	}
	connection, err := p.connectionToRelay(*relay)
	if err != nil {
		return err
	}
	done := make(chan transfer)
	if len(args) == 3 {
		p.SetStreamHandler(proto.ProtoIDv2Stop, func(s network.Stream) {
			circuit := make([]byte, 1)
			err := acceptCircuit(s)
			if err == nil {
				_, err = io.ReadFull(s, circuit)
			}
			if err != nil {
				done <- transfer{err: fmt.Errorf("an inbound circuit: %w", err)}
				return
			}
			done <- converse(s, circuit[0], false, lasts)
		})
		if _, err := p.reserve(*relay); err != nil {
			return err
		}
		fmt.Println("peer", p.ID())
	} else {
		target, err := peer.Decode(args[3])
		if err != nil {
			return err
		}
		for circuit := range circuits {
			s, err := p.circuit(*relay, target)
			if err != nil {
				return fmt.Errorf("circuit %d: %w", circuit, err)
			}
			go func() {
				if _, err := s.Write([]byte{byte(circuit)}); err != nil {
					done <- transfer{err: err}
					return
				}
				done <- converse(s, byte(circuit), true, lasts)
			}()
		}
	}
	sent, received := make([]int64, circuits), make([]int64, circuits)
	for range circuits {
		c := <-done
		if c.err != nil {
			return fmt.Errorf("circuit %d: %w", c.circuit, c.err)
		}
		sent[c.circuit], received[c.circuit] = c.sent, c.received
	}
	if now, err := p.connectionToRelay(*relay); err != nil || now != connection {
		return fmt.Errorf("the connection to the relay is another one: %v", err)
	}
	fmt.Println("sent", sent)
	fmt.Println("received", received)
	// The other side may still be reading: exit only when standard input ends.
	io.Copy(io.Discard, os.Stdin)
	return nil
}

// circuit requests a circuit directly: go-libp2p's own dial opens one connection per peer.
func (p *party) circuit(relay peer.AddrInfo, target peer.ID) (network.Stream, error) {
	ctx, cancel := step()
	defer cancel()
	s, err := p.NewStream(ctx, relay.ID, proto.ProtoIDv2Hop)
	if err != nil {
		return nil, err
	}
	s.SetDeadline(time.Now().Add(stepTimeout))
	if err := util.NewDelimitedWriter(s).WriteMsg(connectTo(target)); err != nil {
		return nil, err
	}
	answers := util.NewDelimitedReader(s, maxMessage) // reads byte by byte, so nothing beyond the answer
	defer answers.Close()
	var answer pb.HopMessage
	if err := answers.ReadMsg(&answer); err != nil {
		return nil, err
	}
	if answer.GetStatus() != pb.Status_OK {
		return nil, fmt.Errorf("answered %s", answer.GetStatus())
	}
	return s, nil
}

// acceptCircuit accepts a circuit as its target.
func acceptCircuit(s network.Stream) error {
	s.SetDeadline(time.Now().Add(stepTimeout))
	requests := util.NewDelimitedReader(s, maxMessage)
	defer requests.Close()
	var request pb.StopMessage
	if err := requests.ReadMsg(&request); err != nil {
		return err
	}
	if request.GetType() != pb.StopMessage_CONNECT {
		return fmt.Errorf("a stop stream with %s", request.GetType())
	}
	return util.NewDelimitedWriter(s).WriteMsg(&pb.StopMessage{Type: pb.StopMessage_STATUS.Enum(), Status: pb.Status_OK.Enum()})
}

// converse sends for this duration and closes its half, while it receives up to the other side's end.
func converse(s network.Stream, circuit byte, isSource bool, lasts time.Duration) transfer {
	defer s.Reset() // has no effect after both ends
	s.SetDeadline(time.Now().Add(lasts + 2*stepTimeout))
	mine, theirs := 2*circuit, 2*circuit+1
	if !isSource {
		mine, theirs = theirs, mine
	}
	c := transfer{circuit: circuit}
	wrote := make(chan error, 1)
	go func() {
		payload := repeating(mine)
		for until := time.Now().Add(lasts); time.Now().Before(until); {
			from := int(c.sent % period)
			n, err := s.Write(payload[from : from+16*kib])
			c.sent += int64(n)
			if err != nil {
				wrote <- fmt.Errorf("after %d bytes sent: %w", c.sent, err)
				return
			}
		}
		wrote <- s.CloseWrite()
	}()
	payload, buffer := repeating(theirs), make([]byte, 64*kib)
	var readErr error
	for readErr == nil {
		var n int
		n, readErr = s.Read(buffer)
		from := int(c.received % period)
		if !bytes.Equal(buffer[:n], payload[from:from+n]) {
			readErr = errWrong
		}
		c.received += int64(n)
	}
	if readErr == io.EOF {
		readErr = nil
	} else {
		s.Reset()
		readErr = fmt.Errorf("after %d bytes received: %w", c.received, readErr)
	}
	c.err = errors.Join(readErr, <-wrote)
	return c
}

// repeating returns the payload of a seed, repeated, so that any slice of a period is contiguous.
func repeating(seed byte) []byte {
	once := make([]byte, period)
	x := uint32(seed)
	for at := range once {
		x = x*1664525 + 1013904223
		once[at] = byte(x >> 24)
	}
	return bytes.Repeat(once, 3)
}

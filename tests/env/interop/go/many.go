// Many circuits at once between two parties, each carrying as much as it can both ways for a while.
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

// period is how many bytes of a payload come before it begins anew: a prime, so that no piece that is lost,
// doubled or moved goes unnoticed.
const period = 65521

// carried is how much of one circuit was sent and received.
type carried struct {
	circuit        byte
	sent, received int64
	err            error
}

// many is one party: `many <relay> <circuits> <seconds> [<target>]`. Without a target it reserves, says who it is
// and agrees to circuits. tests/interop/many.rs says what goes over them.
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
	done := make(chan carried)
	if len(args) == 3 {
		p.SetStreamHandler(proto.ProtoIDv2Stop, func(s network.Stream) {
			circuit := make([]byte, 1)
			err := agree(s)
			if err == nil {
				_, err = io.ReadFull(s, circuit)
			}
			if err != nil {
				done <- carried{err: fmt.Errorf("a circuit that comes: %w", err)}
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
					done <- carried{err: err}
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
	// The other side may still read: it goes when it is told to.
	io.Copy(io.Discard, os.Stdin)
	return nil
}

// circuit asks for a circuit by hand: go-libp2p's own dial gives one connection to a peer.
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
	answers := util.NewDelimitedReader(s, maxMessage) // reads byte by byte, and so no more than the answer
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

// agree accepts a circuit as its target.
func agree(s network.Stream) error {
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

// converse sends for as long as it lasts and closes its half, while it receives up to the other's end.
func converse(s network.Stream, circuit byte, isSource bool, lasts time.Duration) carried {
	defer s.Reset() // does nothing behind both ends
	s.SetDeadline(time.Now().Add(lasts + 2*stepTimeout))
	mine, theirs := 2*circuit, 2*circuit+1
	if !isSource {
		mine, theirs = theirs, mine
	}
	c := carried{circuit: circuit}
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

// repeating is the payload of a seed, twice and more.
func repeating(seed byte) []byte {
	once := make([]byte, period)
	x := uint32(seed)
	for at := range once {
		x = x*1664525 + 1013904223
		once[at] = byte(x >> 24)
	}
	return bytes.Repeat(once, 3)
}

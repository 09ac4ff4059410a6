// Refusals and their status codes, for requests that this client encodes
// itself: go-libp2p's own client would not send most of them.
package main

import (
	"fmt"
	"strings"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/pb"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/proto"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/util"
)

// maxMessage is the longest message of the protocol, in bytes.
const maxMessage = 4096

func statuses(relay peer.AddrInfo) error {
	source, err := newParty()
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := newReserved(relay)
	if err != nil {
		return err
	}
	defer target.Close()
	// It reserves, but does not support the stop protocol.
	deaf, err := newReserved(relay, libp2p.DisableRelay())
	if err != nil {
		return err
	}
	defer deaf.Close()
	asker, err := newParty()
	if err != nil {
		return err
	}
	defer asker.Close()
	// It never reserves.
	stranger, err := newParty()
	if err != nil {
		return err
	}
	defer stranger.Close()

	if err := source.dial(relay, stranger.ID()); err == nil || !strings.Contains(err.Error(), "NO_RESERVATION") {
		return fmt.Errorf("dial of a peer without a reservation: NO_RESERVATION expected, got %v", err)
	}
	proved("go-libp2p's dial of a peer without a reservation fails with NO_RESERVATION")
	if _, _, err := source.connect(relay, target); err != nil {
		return fmt.Errorf("the one circuit that target may have: %w", err)
	}

	for _, want := range []struct {
		status  pb.Status
		request *pb.HopMessage
		what    string
	}{
		{pb.Status_NO_RESERVATION, connectTo(stranger.ID()), "CONNECT to a peer without a reservation"},
		{pb.Status_CONNECTION_FAILED, connectTo(deaf.ID()), "CONNECT to a peer that does not speak stop"},
		{pb.Status_RESOURCE_LIMIT_EXCEEDED, connectTo(target.ID()), "CONNECT to a peer that has all circuits it may have"},
		{pb.Status_MALFORMED_MESSAGE, connectTo(""), "CONNECT to an empty peer id"},
		{pb.Status_MALFORMED_MESSAGE, connectTo("no peer id"), "CONNECT to what is no peer id"},
		{pb.Status_UNEXPECTED_MESSAGE, &pb.HopMessage{Type: pb.HopMessage_STATUS.Enum()}, "STATUS"},
		{pb.Status_OK, &pb.HopMessage{Type: pb.HopMessage_RESERVE.Enum()}, "RESERVE after all that"},
	} {
		status, err := asker.ask(relay, want.request)
		if err != nil {
			return fmt.Errorf("%s: %w", want.what, err)
		}
		if status != want.status {
			return fmt.Errorf("%s: %s expected, got %s", want.what, want.status, status)
		}
		proved("%s is answered %s", want.what, status)
	}
	return nil
}

func connectTo(target peer.ID) *pb.HopMessage {
	return &pb.HopMessage{Type: pb.HopMessage_CONNECT.Enum(), Peer: &pb.Peer{Id: []byte(target)}}
}

// ask sends one request and returns the status that the relay answers with.
func (p *party) ask(relay peer.AddrInfo, request *pb.HopMessage) (pb.Status, error) {
	ctx, cancel := step()
	defer cancel()
	if err := p.Connect(ctx, relay); err != nil {
		return 0, err
	}
	stream, err := p.NewStream(ctx, relay.ID, proto.ProtoIDv2Hop)
	if err != nil {
		return 0, err
	}
	defer stream.Close()
	deadline, _ := ctx.Deadline()
	stream.SetDeadline(deadline)
	if err := util.NewDelimitedWriter(stream).WriteMsg(request); err != nil {
		return 0, err
	}
	answers := util.NewDelimitedReader(stream, maxMessage)
	defer answers.Close()
	var answer pb.HopMessage
	if err := answers.ReadMsg(&answer); err != nil {
		return 0, err
	}
	if answer.GetType() != pb.HopMessage_STATUS {
		return 0, fmt.Errorf("answered with a %s", answer.GetType())
	}
	return answer.GetStatus(), nil
}

// The client for bulk: go-libp2p is what most peers run, and its TLS chooses AES.
package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"strconv"
	"sync"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/pb"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/proto"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/util"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"

	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
)

const (
	piece   = 64 * 1024
	longest = 4096 // of a message
)

// carry sets up circuits, says so, and for each line that it reads carries so many bytes through each.
func carry(relay, security, circuits string) {
	info, err := peer.AddrInfoFromString(relay)
	check(err)
	count, err := strconv.Atoi(circuits)
	check(err)
	sources := make([]network.Stream, count)
	targets := make([]network.Stream, count)
	for i := range count {
		sources[i], targets[i] = circuit(*info, security)
	}
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		bytes, err := strconv.ParseInt(lines.Text(), 10, 64)
		check(err)
		var all sync.WaitGroup
		for i := range count {
			all.Go(func() { write(sources[i], bytes) })
			all.Go(func() {
				_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.LimitReader(targets[i], bytes), make([]byte, piece))
				check(err)
			})
		}
		all.Wait()
		fmt.Println("carried")
	}
}

func write(to io.Writer, bytes int64) {
	for buffer := make([]byte, piece); bytes > 0; {
		n, err := to.Write(buffer[:min(bytes, piece)])
		check(err)
		bytes -= int64(n)
	}
}

// circuit returns both ends of one between two new peers.
func circuit(relay peer.AddrInfo, security string) (network.Stream, network.Stream) {
	ctx := context.Background()
	source, target := newHost(security), newHost(security)
	check(source.Connect(ctx, relay))
	stops := make(chan network.Stream, 1)
	target.SetStreamHandler(proto.ProtoIDv2Stop, func(stream network.Stream) { stops <- stream })
	_, err := client.Reserve(ctx, target, relay)
	check(err)
	hop, err := source.NewStream(network.WithAllowLimitedConn(ctx, "bench"), relay.ID, proto.ProtoIDv2Hop)
	check(err)
	check(util.NewDelimitedWriter(hop).WriteMsg(&pb.HopMessage{
		Type: pb.HopMessage_CONNECT.Enum(),
		Peer: util.PeerInfoToPeerV2(peer.AddrInfo{ID: target.ID()}),
	}))
	stop := <-stops
	check(util.NewDelimitedReader(stop, longest).ReadMsg(&pb.StopMessage{}))
	check(util.NewDelimitedWriter(stop).WriteMsg(&pb.StopMessage{
		Type:   pb.StopMessage_STATUS.Enum(),
		Status: pb.Status_OK.Enum(),
	}))
	var answer pb.HopMessage
	check(util.NewDelimitedReader(hop, longest).ReadMsg(&answer))
	if answer.GetStatus() != pb.Status_OK {
		log.Fatalf("no circuit: %s", answer.GetStatus())
	}
	return hop, stop
}

func newHost(security string) host.Host {
	option := libp2p.Security(noise.ID, noise.New)
	if security == "tls" {
		option = libp2p.Security(libp2ptls.ID, libp2ptls.New)
	}
	h, err := libp2p.New(libp2p.NoListenAddrs, libp2p.Transport(tcp.NewTCPTransport), option,
		libp2p.ResourceManager(&network.NullResourceManager{}))
	check(err)
	return h
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

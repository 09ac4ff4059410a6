// go-libp2p's relay, as its users build one; without limits, so that only the work is compared.
package main

import (
	"fmt"
	"log"
	"math"
	"os"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	"github.com/multiformats/go-multiaddr"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) == 4 {
		carry(os.Args[1], os.Args[2], os.Args[3])
		return
	}
	host, err := libp2p.New(
		libp2p.ListenAddrStrings("/ip4/127.0.0.1/tcp/0"),
		libp2p.ResourceManager(&network.NullResourceManager{}),
		libp2p.DisableRelay(), // it serves circuits, and uses none
		libp2p.AddrsFactory(announced),
	)
	if err != nil {
		log.Fatalf("no host: %v", err)
	}
	resources := relay.DefaultResources()
	resources.Limit = nil
	resources.MaxReservations = math.MaxInt
	resources.MaxCircuits = math.MaxInt
	resources.MaxReservationsPerIP = math.MaxInt
	resources.MaxReservationsPerASN = math.MaxInt
	if _, err := relay.New(host, relay.WithResources(resources)); err != nil {
		log.Fatalf("no relay: %v", err)
	}
	for _, address := range host.Addrs() {
		fmt.Fprintf(os.Stdout, "listening on %s/p2p/%s\n", address, host.ID())
	}
	select {}
}

// announced adds the address of the environment: a reservation has global ones only.
func announced(found []multiaddr.Multiaddr) []multiaddr.Multiaddr {
	address, err := multiaddr.NewMultiaddr(os.Getenv("ANNOUNCE"))
	if err != nil {
		return found
	}
	return append(found, address)
}

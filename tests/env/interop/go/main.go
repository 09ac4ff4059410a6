// An interop client: go-libp2p against a running relay.
//
//	go run . <scenario> <relay multiaddr ending in /p2p/<relay>>...
//
// If several addresses name the same relay, all of them are used.
//
// Prints one line per assertion that held. The first failure is printed in
// one line, and the exit status is 1.
package main

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
)

// others are the relays other than the first, for scenarios that take several.
var others []peer.AddrInfo

// scenarios by name, with the relay options each of them expects.
var scenarios = map[string]func(relay peer.AddrInfo) error{
	"reserve":   reserveAndRenew,
	"autorelay": autoRelay,
	"unlimited": unlimited, // --circuit-bytes 0 --circuit-duration 0s
	"device":    device,    // as unlimited
	"limited":   limited,   // --circuit-bytes 128KiB --circuit-duration 5s
	"statuses":  statuses,  // --max-circuits-per-peer 1
	"full":      full,      // --max-reservations 1
	"private":   private,   // --swarm-key $SWARM_KEY
	"websocket": websocket, // as unlimited; a TCP and a WebSocket address
	"discover":  discover,  // a relay with a global address and hundreds of others
	"restart":   restart,   // the defaults; the relay is killed and restarted during the test
	"clock":     clock,     // the defaults; the relay's clock is before 2026 and set during the test
	"holders":   holders,   // the defaults; the network is bad, or CPU time is scarce
	"newcomers": newcomers, // --max-reservations 60, and 60 holders

	// --autonat; several relays
	"reachable":   learns(network.ReachabilityPublic),
	"unreachable": learns(network.ReachabilityPrivate),
	"behind":      learnsItIsPrivate, // of a host without a global address
}

func main() {
	var err error
	switch {
	case len(os.Args) > 2 && scenarios[os.Args[1]] != nil:
		err = run(os.Args[1], os.Args[2:])
	case len(os.Args) == 2 && os.Args[1] == "fleet": // prints the bootstrap node; then its relays are started
		err = fleet()
	case len(os.Args) == 2 && os.Args[1] == "metrics": // on standard input
		err = metrics(os.Stdin)
	case len(os.Args) > 4 && os.Args[1] == "many":
		err = many(os.Args[2:])
	default:
		names := strings.Join(slices.Sorted(maps.Keys(scenarios)), "|")
		fmt.Fprintln(os.Stderr, "usage: go run .", names, "<relay multiaddr>..., or go run . fleet, or go run . metrics, or go run . many <relay multiaddr> <circuits> <seconds> [<target>]")
		os.Exit(2)
	}
	if err != nil {
		// A dial error of go-libp2p has one line per address that was dialed.
		fmt.Fprintln(os.Stderr, "failed:", os.Args[1]+":", strings.Join(strings.Fields(err.Error()), " "))
		os.Exit(1)
	}
}

func run(scenario string, addresses []string) error {
	var relays []peer.AddrInfo
	for _, address := range addresses {
		at, err := peer.AddrInfoFromString(address)
		if err != nil {
			return fmt.Errorf("relay address %s: %w", address, err)
		}
		if last := len(relays) - 1; last >= 0 && relays[last].ID == at.ID {
			relays[last].Addrs = append(relays[last].Addrs, at.Addrs...)
		} else {
			relays = append(relays, *at)
		}
	}
	others = relays[1:]
	return scenarios[scenario](relays[0])
}

// proved prints one line about an assertion that held.
func proved(format string, args ...any) {
	fmt.Printf("ok: "+format+"\n", args...)
}

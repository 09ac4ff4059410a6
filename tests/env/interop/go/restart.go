// Restart: the relay is killed and started anew under many hosts, and the
// AutoRelay of each finds back to it, at its own pace.
package main

import (
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/host/autorelay"
)

// hostsOfRestart all come from one address: no more than it may have slots.
const hostsOfRestart = 60

// restart prints `reserved` once all hosts hold a slot, for the relay to be
// killed and started anew, and `again` once all of them hold one on the new one.
func restart(relay peer.AddrInfo) error {
	asked := make(chan error, 16)
	for range hostsOfRestart {
		p, err := newParty(libp2p.ForceReachabilityPrivate(), libp2p.EnableAutoRelayWithStaticRelays(
			[]peer.AddrInfo{relay}, autorelay.WithMetricsTracer(newTold(asked))))
		if err != nil {
			return err
		}
		defer p.Close()
	}
	start := time.Now()
	if err := allGranted(asked); err != nil {
		return err
	}
	proved("%d hosts reserved in %s", hostsOfRestart, time.Since(start).Round(time.Millisecond))
	fmt.Println("reserved")
	if err := allGranted(asked); err != nil {
		return fmt.Errorf("after the relay was started anew: %w", err)
	}
	fmt.Println("again")
	return nil
}

// allGranted waits until as many were granted a slot as there are hosts, and
// none was refused.
func allGranted(asked <-chan error) error {
	for n := range hostsOfRestart {
		err, late := await(asked, fmt.Sprintf("%d of %d hosts hold a slot", n, hostsOfRestart))
		if late != nil {
			return late
		}
		if err != nil {
			return fmt.Errorf("%d of %d hosts hold a slot, the next was refused: %w", n, hostsOfRestart, err)
		}
	}
	return nil
}

// told hears of each attempt of an AutoRelay to reserve: nothing else tells of
// it. It stands for AutoRelay's own tracer, whose types have no names outside.
type told struct {
	autorelay.MetricsTracer
	asked chan<- error
}

func newTold(asked chan<- error) told { return told{autorelay.NewMetricsTracer(), asked} }

// ReservationRequestFinished tells what came of one.
func (t told) ReservationRequestFinished(isRefresh bool, err error) {
	if !isRefresh {
		t.asked <- err
	}
}

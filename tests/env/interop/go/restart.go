// Restart: the relay is killed and restarted while many hosts hold slots, and
// the AutoRelay of each reserves again, at its own pace.
package main

import (
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/host/autorelay"
)

// hostsOfRestart all have one address, so there are at most as many as it may hold slots.
const hostsOfRestart = 60

// holdSlots starts hosts that use the relay, and prints `reserved` once each
// holds a slot. It passes each to prepare before, and returns what closes them.
func holdSlots(relay peer.AddrInfo, attempts chan error, prepare func(*party)) (func(), error) {
	var hosts []*party
	closeAll := func() {
		for _, p := range hosts {
			p.Close()
		}
	}
	for range hostsOfRestart {
		p, err := newParty(libp2p.ForceReachabilityPrivate(), libp2p.EnableAutoRelayWithStaticRelays(
			[]peer.AddrInfo{relay}, autorelay.WithMetricsTracer(newAttemptTracer(attempts))))
		if err != nil {
			return closeAll, err
		}
		hosts = append(hosts, p)
		prepare(p)
	}
	start := time.Now()
	if err := allGranted(attempts); err != nil {
		return closeAll, err
	}
	proved("%d hosts reserved in %s", hostsOfRestart, time.Since(start).Round(time.Millisecond))
	fmt.Println("reserved")
	return closeAll, nil
}

// restart prints `reserved` once all hosts hold a slot, whereupon the test
// restarts the relay, and `again` once all of them hold one on the new relay.
func restart(relay peer.AddrInfo) error {
	attempts := make(chan error, 16)
	closeAll, err := holdSlots(relay, attempts, func(*party) {})
	defer closeAll()
	if err != nil {
		return err
	}
	if err := allGranted(attempts); err != nil {
		return fmt.Errorf("after the relay was restarted: %w", err)
	}
	fmt.Println("again")
	return nil
}

// allGranted waits until each host was granted a slot; a refusal is an error.
func allGranted(attempts <-chan error) error {
	for n := range hostsOfRestart {
		err, late := await(attempts, fmt.Sprintf("%d of %d hosts hold a slot", n, hostsOfRestart))
		if late != nil {
			return late
		}
		if err != nil {
			return fmt.Errorf("%d of %d hosts hold a slot, the next was refused: %w", n, hostsOfRestart, err)
		}
	}
	return nil
}

// attemptTracer reports each attempt of an AutoRelay to reserve, for which
// there is no event. It replaces AutoRelay's own tracer, whose types are private.
type attemptTracer struct {
	autorelay.MetricsTracer
	attempts chan<- error
}

func newAttemptTracer(attempts chan<- error) attemptTracer {
	return attemptTracer{autorelay.NewMetricsTracer(), attempts}
}

// ReservationRequestFinished reports the result of an attempt.
func (t attemptTracer) ReservationRequestFinished(isRefresh bool, err error) {
	if !isRefresh {
		t.attempts <- err
	}
}

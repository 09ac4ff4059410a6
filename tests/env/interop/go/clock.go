// Clock: the relay starts before its wall clock is set, and serves once it is. The AutoRelay of a host waits for it.
package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/host/autorelay"
)

// clock prints `waiting` once the AutoRelay of a host has found that the relay does not support the hop protocol,
// whereupon the test sets the relay's clock, and `reserved` once the host holds a slot.
func clock(relay peer.AddrInfo) error {
	attempts, checked := make(chan error, 16), make(chan bool, 16)
	tracer := clockTracer{newAttemptTracer(attempts), checked}
	p, err := newParty(libp2p.ForceReachabilityPrivate(), libp2p.EnableAutoRelayWithStaticRelays(
		[]peer.AddrInfo{relay}, autorelay.WithMetricsTracer(tracer)))
	if err != nil {
		return err
	}
	defer p.Close()
	supported, err := await(checked, "AutoRelay reads what the relay supports")
	if err != nil {
		return err
	}
	if supported {
		return errors.New("the relay supports the hop protocol before its clock is set")
	}
	fmt.Println("waiting")
	start := time.Now()
	refused, err := await(attempts, "AutoRelay reserves after the clock was set")
	if err = errors.Join(err, refused); err != nil {
		return err
	}
	proved("AutoRelay reserved at its first attempt, %s after it found no hop protocol", time.Since(start).Round(time.Millisecond))
	fmt.Println("reserved")
	return nil
}

// clockTracer reports, besides attempts to reserve, whether AutoRelay found the hop protocol at a relay.
type clockTracer struct {
	attemptTracer
	checked chan<- bool
}

// CandidateChecked reports what AutoRelay found.
func (t clockTracer) CandidateChecked(supported bool) {
	t.checked <- supported
}

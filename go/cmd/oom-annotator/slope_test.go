package main

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

// sample is a figure at a time. Between two processes of a program it jumps: run tells them apart.
type sample struct {
	at    time.Duration
	run   int
	value float64
}

// trend is how a figure grows in a day, and the standard error of that.
type trend struct{ perDay, deviation float64 }

// beyond reports whether a figure certainly grows by more than most in a day: less three standard errors, it still does.
func (s trend) beyond(most float64) bool { return s.perDay-3*s.deviation > most }

// fit fits one slope by least squares to all runs, each of which has an intercept of its own. Neighbouring samples are alike, and would
// claim to be sure: what is fitted are the means of blocks. It reports false where no run is long enough.
func fit(samples []sample, block time.Duration) (trend, bool) {
	type key struct {
		run   int
		block time.Duration
	}
	type mean struct{ n, x, y float64 }
	blocks := map[key]*mean{}
	for _, s := range samples {
		k := key{s.run, s.at / block}
		if blocks[k] == nil {
			blocks[k] = &mean{}
		}
		b := blocks[k]
		b.n++
		b.x += s.at.Hours() / 24
		b.y += s.value
	}
	runs := map[int]*mean{}
	for k, b := range blocks {
		b.x, b.y = b.x/b.n, b.y/b.n
		if runs[k.run] == nil {
			runs[k.run] = &mean{}
		}
		r := runs[k.run]
		r.n++
		r.x += b.x
		r.y += b.y
	}
	var xx, xy, yy float64
	for k, b := range blocks {
		r := runs[k.run]
		x, y := b.x-r.x/r.n, b.y-r.y/r.n
		xx, xy, yy = xx+x*x, xy+x*y, yy+y*y
	}
	freedom := float64(len(blocks) - len(runs) - 1)
	if freedom < 2 || xx == 0 {
		return trend{}, false
	}
	return trend{xy / xx, math.Sqrt(math.Max(0, yy-xy*xy/xx) / freedom / xx)}, true
}

// TestFit: a leak is found, also over restarts, and with the right size; noise is not one.
func TestFit(t *testing.T) {
	const hours, most, leak = 2, 16, 96 // MiB in a day
	series := func(random *rand.Rand, perDay float64, restart time.Duration) (samples []sample) {
		var wander float64
		for at := time.Duration(0); at < hours*time.Hour; at += 3 * time.Second {
			run, age := 0, at
			if restart > 0 {
				run, age = int(at/restart), at%restart
			}
			wander = 0.95*wander + 0.1*random.NormFloat64() // as a heap: the next is like the last
			garbage := float64(at/time.Second%40) / 20      // up to 2 MiB, until it is collected
			samples = append(samples, sample{at, run, 30 + 3*float64(run%2) + age.Hours()/24*perDay + wander + garbage})
		}
		return samples
	}
	for _, restart := range []time.Duration{0, 20 * time.Minute} {
		for seed := range uint64(100) {
			random := rand.New(rand.NewPCG(seed, 0))
			if got, ok := fit(series(random, 0, restart), 5*time.Minute); !ok || got.beyond(most) {
				t.Errorf("seed %d, restart every %v: noise is taken for growth: %+v", seed, restart, got)
			}
			got, ok := fit(series(random, leak, restart), 5*time.Minute)
			if !ok || !got.beyond(most) || math.Abs(got.perDay-leak) > 5*got.deviation {
				t.Errorf("seed %d, restart every %v: %d MiB in a day are not found: %+v", seed, restart, leak, got)
			}
		}
	}
	if _, ok := fit(series(rand.New(rand.NewPCG(0, 0)), leak, time.Minute), 5*time.Minute); ok {
		t.Error("runs of a minute are fitted by blocks of five")
	}
}

package main

import (
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// A Stat summarizes repeated measurements.
type Stat struct {
	Median float64 `json:"median"`
	Q1     float64 `json:"q1"` // a quarter of the samples is below
	Q3     float64 `json:"q3"` // a quarter of the samples is above
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	Count  int     `json:"count"`
}

func statOf(samples []float64) Stat {
	s := slices.Sorted(slices.Values(samples))
	if len(s) == 0 {
		return Stat{}
	}
	return Stat{quantile(s, 0.5), quantile(s, 0.25), quantile(s, 0.75), s[0], s[len(s)-1], len(s)}
}

// exactly returns the Stat of a value without spread.
func exactly(v float64) Stat { return Stat{v, v, v, v, v, 1} }

// quantile interpolates between the two nearest of the sorted samples.
func quantile(sorted []float64, q float64) float64 {
	at := q * float64(len(sorted)-1)
	i := int(at)
	if i+1 == len(sorted) {
		return sorted[i]
	}
	return sorted[i] + (at-float64(i))*(sorted[i+1]-sorted[i])
}

// cpuTime returns the time that the thread has spent on the CPU, so that the time of other
// threads does not count.
func cpuTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		panic(err)
	}
	return time.Duration(ts.Nano())
}

// elapsed returns how long fn takes.
func elapsed(fn func()) time.Duration {
	begin := time.Now()
	fn()
	return time.Since(begin)
}

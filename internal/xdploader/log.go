package xdploader

import (
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
)

// Levels of messages. -v shows those of debug too, -vv all.
const (
	levelWarn = iota
	levelInfo
	levelDebug
	levelVerbose
)

// A logger writes what is not output to stderr.
type logger struct {
	w     io.Writer
	level int
}

func (l *logger) louder() { l.level = min(l.level+1, levelVerbose) }

func (l *logger) print(level int, prefix, format string, args ...any) {
	if level <= l.level {
		fmt.Fprintf(l.w, prefix+format+"\n", args...)
	}
}

// What the tool says itself.
func (l *logger) warn(format string, args ...any)  { l.print(levelWarn, "", format, args...) }
func (l *logger) debug(format string, args ...any) { l.print(levelDebug, "", format, args...) }

// What the library says in xdp-loader.
func (l *logger) libWarn(format string, args ...any) {
	l.print(levelInfo, " libxdp: ", format, args...)
}
func (l *logger) libInfo(format string, args ...any) {
	l.print(levelDebug, " libxdp: ", format, args...)
}

// note is what xdp-loader does not say: whose chain it is, what to do.
func (l *logger) note(format string, args ...any) {
	l.print(levelWarn, "libdispatcher: ", format, args...)
}

// detail says with -v what is behind an error number, and with -vv all that
// the verifier said.
func (l *logger) detail(err error) {
	var f *failure
	if errors.As(err, &f) {
		err = f.err
	}
	if err == nil {
		return
	}
	l.print(levelDebug, " libdispatcher: ", "%v", err)
	var refusal *ebpf.VerifierError
	if errors.As(err, &refusal) {
		l.print(levelVerbose, " libdispatcher: ", "%+v", refusal)
	}
}

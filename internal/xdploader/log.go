package xdploader

import (
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
)

// Levels of messages. -v shows debug messages too, -vv all.
const (
	levelWarn = iota
	levelInfo
	levelDebug
	levelVerbose
)

// A logger writes messages to stderr.
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

// Messages of the tool itself.
func (l *logger) warn(format string, args ...any)  { l.print(levelWarn, "", format, args...) }
func (l *logger) debug(format string, args ...any) { l.print(levelDebug, "", format, args...) }

// libWarn and the functions below print messages of the library inside
// xdp-loader.
func (l *logger) libWarn(format string, args ...any) {
	l.print(levelInfo, " libxdp: ", format, args...)
}
func (l *logger) libInfo(format string, args ...any) {
	l.print(levelDebug, " libxdp: ", format, args...)
}

// note prints what xdp-loader does not say: which chain it is, and what to do.
func (l *logger) note(format string, args ...any) {
	l.print(levelWarn, "libdispatcher: ", format, args...)
}

// detail prints with -v the cause of an error number, and with -vv the whole
// output of the verifier.
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

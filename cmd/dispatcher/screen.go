package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/term"
)

// A screen shows blocks that are printed again and again: on a terminal in
// place, elsewhere one after the other.
type screen struct {
	a        *app
	terminal *os.File // nil when stdout is not a terminal
	lines    int      // of the previous block there
}

const (
	cursorOff   = "\x1b[?25l"
	cursorOn    = "\x1b[?25h"
	cursorStart = "\x1b[G"
	wrapOff     = "\x1b[?7l" // the terminal cuts long lines
	wrapOn      = "\x1b[?7h"
	clearDown   = "\x1b[J"
)

func (a *app) screen() *screen {
	s := &screen{a: a}
	if os.Getenv("TERM") != "dumb" {
		s.terminal = terminal(a.stdout)
	}
	return s
}

// show writes a block with the time above it.
func (s *screen) show(now time.Time, block string) error {
	text := now.Local().Format("15:04:05") + "\n" + block
	if s.terminal == nil {
		return s.a.print(text + "\n")
	}
	lines := strings.SplitAfter(strings.TrimSuffix(text, "\n"), "\n")
	lines[len(lines)-1] += "\n"
	if _, height, err := term.GetSize(int(s.terminal.Fd())); err == nil && height > 2 && len(lines) >= height {
		left := len(lines) - (height - 2)
		lines = append(lines[:height-2:height-2], fmt.Sprintf("... and %d more lines: name a hook and a device to see less\n", left))
	}
	up := ""
	if s.lines > 0 {
		up = fmt.Sprintf("\x1b[%dA", s.lines)
	}
	s.lines = len(lines)
	return s.a.print(control(s.a.stdout, cursorOff+wrapOff+up+cursorStart+clearDown) + strings.Join(lines, "") + control(s.a.stdout, wrapOn))
}

// restore restores the terminal's settings.
func (s *screen) restore() {
	if s.terminal != nil && s.lines > 0 {
		_ = s.a.print(control(s.a.stdout, cursorOn))
	}
}

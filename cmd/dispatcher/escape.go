package main

import (
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"golang.org/x/term"
)

// An escaper writes text to people. Names of devices, cgroups, processes and files are
// chosen by others, also by users without any rights: in a user namespace of his own a user
// can name a device. So an escaper writes what could act on a terminal, or hide in it, as
// \u001b: control characters but tab and newline, and those that only format, as the marks
// for the direction of writing. Bytes that are not UTF-8 become \xff. In JSON the first form
// means the same as the character.
type escaper struct {
	w io.Writer
	// mark stands for the escape character of this command's own sequences. It is random,
	// so that no name can contain it.
	mark string
}

func newEscaper(w io.Writer) *escaper { return &escaper{w, "\x1b" + rand.Text()} }

func (e *escaper) Write(text []byte) (int, error) {
	parts := strings.Split(string(text), e.mark)
	for i := range parts {
		parts[i] = escape(parts[i])
	}
	if _, err := io.WriteString(e.w, strings.Join(parts, "\x1b")); err != nil {
		return 0, err
	}
	return len(text), nil
}

func escape(s string) string {
	var b strings.Builder
	for len(s) > 0 {
		r, n := utf8.DecodeRuneInString(s)
		high, low := utf16.EncodeRune(r)
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[0])
		case r == '\n', r == '\t', !unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp):
			b.WriteString(s[:n])
		case r > 0xffff:
			fmt.Fprintf(&b, `\u%04x\u%04x`, high, low)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
		s = s[n:]
	}
	return b.String()
}

// control returns a sequence for the terminal, in the form that w lets through.
func control(w io.Writer, sequence string) string {
	if e, ok := w.(*escaper); ok {
		return strings.ReplaceAll(sequence, "\x1b", e.mark)
	}
	return sequence
}

// raw returns the writer that w writes to.
func raw(w io.Writer) io.Writer {
	if e, ok := w.(*escaper); ok {
		return e.w
	}
	return w
}

// terminal returns the terminal that w writes to; nil if it is none.
func terminal(w io.Writer) *os.File {
	f, ok := raw(w).(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return nil
	}
	return f
}

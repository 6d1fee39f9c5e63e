package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"testing"

	"github.com/go-quicktest/qt"
)

// What others have named reaches no terminal as it is.
func TestEscape(t *testing.T) {
	for text, want := range map[string]string{
		"veth0\t1\n":              "veth0\t1\n",
		"häuser 家 \\":             "häuser 家 \\",
		"\x1b]0;P\a\x1b[2K\r\x7f": `\u001b]0;P\u0007\u001b[2K\u000d\u007f`,
		"\u009b31m\u202eevil":     `\u009b31m\u202eevil`,
		"zero\u200bwidth\ufeff":   `zero\u200bwidth\ufeff`,
		"tag\U000e0041":           `tag\udb40\udc41`,
		"bad\xff\xc3":             `bad\xff\xc3`,
		"\ufffd":                  "\ufffd",
	} {
		qt.Check(t, qt.Equals(escape(text), want))
		var was string
		if json.Unmarshal([]byte(`"`+want+`"`), &was) == nil {
			qt.Check(t, qt.Equals(was, text))
		}
	}
}

// The command's own sequences pass, and nobody else's, also in its errors.
func TestEscaper(t *testing.T) {
	var b bytes.Buffer
	w := newEscaper(&b)
	a := &app{stdout: w, color: "always"}
	qt.Assert(t, qt.IsNil(a.print(a.paint(a.stdout, "eth\x1b[0m", red)+"\n")))
	qt.Check(t, qt.Equals(b.String(), "\x1b[31meth\\u001b[0m\x1b[0m\n"))

	b.Reset()
	qt.Check(t, qt.Equals(run(t.Context(), []string{"list", "--\x1b]0;P\a"}, io.Discard, &b), statusUsage))
	qt.Check(t, qt.StringContains(b.String(), `--\u001b]0;P\u0007`))
	qt.Check(t, qt.IsFalse(bytes.ContainsAny(b.Bytes(), "\x1b\a")))

	_, err := newEscaper(full{}).Write([]byte("x"))
	qt.Check(t, qt.ErrorIs(err, errFull))
}

var errFull = errors.New("no space left")

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errFull }

package document

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/libdispatcher/dispatcher/declare"
)

// Format writes a document as Parse reads it: a line for each key of an attachment. comments, by the index of
// the attachment, come before it.
func Format(d *declare.Document, comments map[int]string) ([]byte, error) {
	var b strings.Builder
	b.WriteString("attachments:\n")
	if len(d.Attachments) == 0 {
		return []byte("attachments: []\n"), nil
	}
	for i := range d.Attachments {
		for line := range strings.Lines(comments[i]) {
			b.WriteString("# " + strings.TrimSuffix(line, "\n") + "\n")
		}
		text, err := json.Marshal(&d.Attachments[i])
		if err != nil {
			return nil, err
		}
		dec := json.NewDecoder(bytes.NewReader(text))
		dec.UseNumber()
		if _, err := dec.Token(); err != nil { // the first brace
			return nil, err
		}
		for sign := "- "; dec.More(); sign = "  " {
			key, err := dec.Token()
			if err != nil {
				return nil, err
			}
			value, err := flow(dec)
			if err != nil {
				return nil, err
			}
			fmt.Fprintf(&b, "%s%v: %s\n", sign, key, value)
		}
	}
	return []byte(b.String()), nil
}

// flow writes a value of JSON as people write it in YAML, on a line.
func flow(dec *json.Decoder) (string, error) {
	t, err := dec.Token()
	if err != nil {
		return "", err
	}
	switch t := t.(type) {
	case json.Delim:
		var parts []string
		for dec.More() {
			part := ""
			if t == '{' {
				key, err := dec.Token()
				if err != nil {
					return "", err
				}
				part = plain(fmt.Sprint(key)) + ": "
			}
			value, err := flow(dec)
			if err != nil {
				return "", err
			}
			parts = append(parts, part+value)
		}
		end, err := dec.Token()
		return fmt.Sprintf("%v%s%v", t, strings.Join(parts, ", "), end), err
	case string:
		return plain(t), nil
	}
	return fmt.Sprint(t), nil
}

// isPlain matches texts that YAML takes for texts without quotes.
var isPlain = regexp.MustCompile(`^[A-Za-z/][A-Za-z0-9_./-]*$`)

func plain(text string) string {
	switch strings.ToLower(text) {
	case "true", "false", "null", "yes", "no", "on", "off", "y", "n":
		return strconv.Quote(text)
	}
	if isPlain.MatchString(text) {
		return text
	}
	quoted, _ := json.Marshal(text)
	return string(quoted)
}

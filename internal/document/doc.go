// Package document reads what is declared from files: YAML that must be right, with the line and
// column of what is not, and folders for such files, with the precedence that systemd has for its own.
package document

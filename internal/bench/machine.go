package main

import (
	"bufio"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// A Machine describes the machine that the figures come from.
type Machine struct {
	Kernel string `json:"kernel"`
	CPU    string `json:"cpu"`
	CPUs   int    `json:"cpus"`
	Go     string `json:"go"`
	// Returns is the kernel's protection against speculated returns, which costs every
	// function.
	Returns string `json:"returns,omitempty"`
}

func thisMachine() Machine {
	m := Machine{CPUs: runtime.NumCPU(), Go: runtime.Version(), CPU: runtime.GOARCH}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		m.Kernel = unix.ByteSliceToString(name.Release[:])
	}
	var returns []string
	for _, flaw := range []string{"spec_rstack_overflow", "retbleed"} {
		if content, err := os.ReadFile("/sys/devices/system/cpu/vulnerabilities/" + flaw); err == nil {
			returns = append(returns, flaw+": "+strings.TrimSpace(string(content)))
		}
	}
	m.Returns = strings.Join(returns, "; ")
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return m
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if key, value, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(key) == "model name" {
			m.CPU = strings.TrimSpace(value)
			break
		}
	}
	return m
}

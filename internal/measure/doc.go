// Package measure tells how often the programs on hooks run, what they say and
// how long they take: on chains of ours by a dispatcher that counts, see
// attach.Count, and elsewhere by the kernel's run statistics of programs.
package measure

// Package measure reports how often the programs on hooks run, which verdicts
// they give and how long they take. On owned chains a counting dispatcher
// counts, see attach.Count. Elsewhere it reads the kernel's run statistics of
// programs.
package measure

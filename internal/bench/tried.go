package main

// tried is for docs/performance.md: what was tried to make the open chain cheaper. The figures are of 22 November
// 2026; they stand here because nothing of this is in the code any more.
const tried = `### What was tried

To make the open chain cheaper these were built for ten empty members, and counted like the chains above (one
program alone is 0) and timed, in turns, 60 rounds, on Linux 6.18. All but the second were dropped.

| dispatcher | instructions | ns |
|---|---:|---:|
| every member by a function of its own, as it was | 276 | 133 ±8% |
| the last one tail-called by main itself: kept | 263 | 121 ±9% |
| the same, the context on the stack in the place of a register | 263 | 129 ±8% |
| the same, verdicts compared by subtraction | 273 | 124 ±8% |
| functions for two members: one called, the next tail-called | 276 | 127 ±9% |
| static functions in the place of global ones | 263 | |

Static functions load on 7.2, whose verifier knows that a tail call returns to the caller of its function; older ones
take the value behind the tail call for the only one. They save nothing.

A slot in the middle executes 27 instructions on x86-64, of which five are the dispatcher's own choice: the
context into its register, the call's counter of tail calls (loaded before each call in a program with tail calls), call,
compare, jump. The function has 18: its entry (6, of which two are endbr64 and two are nops for tracing), the counter kept on
the stack twice, the map and the index, which the verifier wants and the direct jump does not use, the counter loaded, compared and
raised, a nop where the jump is switched off for an empty slot, the counter taken off the stack again, the jump. The member ends with leave and ret. A
function behind libxdp has a call, an entry, a jump and another entry in the place of that. What is left is the
kernel's; a chain that shall be cheaper is sealed.

`

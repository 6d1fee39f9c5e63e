package main

// tried is a part of docs/performance.md: what was tried to make the open chain cheaper. The figures are from 22
// November 2026. They stand here because none of this is in the code any more.
const tried = `### What was tried

To make the open chain cheaper, these dispatchers were built for ten empty members. Their instructions were counted
like those of the chains above (one program alone is 0), and they were timed in turns, 60 rounds, on Linux 6.18. All
except the second were dropped.

| dispatcher | instructions | ns |
|---|---:|---:|
| a function for every member, as before | 276 | 133 ±8% |
| the last member tail-called by main itself: kept | 263 | 121 ±9% |
| the same, with the context on the stack instead of in a register | 263 | 129 ±8% |
| the same, with verdicts compared by subtraction | 273 | 124 ±8% |
| functions for two members: one called, the next tail-called | 276 | 127 ±9% |

A slot in the middle executes 27 instructions on x86-64. Five of them are the dispatcher's own choice: the context into
its register, the call's counter of tail calls (loaded before each call in a program with tail calls), call, compare,
jump. The slot's function has 18:

- its entry (6; two are endbr64, two are nops for tracing);
- the counter put on the stack twice;
- the map and the index, which the verifier wants and the direct jump does not use;
- the counter loaded, compared and raised;
- a nop, where the jump is switched off for an empty slot;
- the counter taken off the stack again, and the jump.

The member ends with leave and ret. A function behind libxdp has a call, an entry, a jump and another entry instead. The
rest is the kernel's. To make a chain cheaper, seal it.

`

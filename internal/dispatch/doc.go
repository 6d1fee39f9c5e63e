// Package dispatch turns a plan into a program: the order of the members, and
// the instructions of the dispatcher that runs them. It is pure: no I/O, no
// system calls, the same plan always gives the same instructions.
//
// # Slots
//
// For each member but the last, the dispatcher has a small static function that
// tail-calls into the member's slot, a prog array of one entry. A program that is
// tail-called from a function returns to the caller of that function. So main gets
// the member's verdict and decides whether the next member runs. The last member's
// verdict is the chain's verdict, so main tail-calls the last member itself.
//
// This is the whole dispatcher of two members, as "bpftool prog dump xlated name
// libdispatcher" shows it. The second member is a closed door: while its slot is
// empty, the verdict is drop (r0 = 1).
//
//	int libdispatcher(struct xdp_md * ctx):
//	   0: (bf) r6 = r1
//	   1: (85) call pc+8#bpf_prog_aa51c0e361a8078c_member_0
//	   2: (56) if w0 != 0x2 goto pc+6
//	   3: (bf) r1 = r6
//	   4: (18) r2 = map[id:933803]
//	   6: (b7) r3 = 0
//	   7: (85) call bpf_tail_call#12
//	   8: (b7) r0 = 1
//	   9: (95) exit
//	int member_0(struct xdp_md * ctx):
//	  10: (18) r2 = map[id:933794]
//	  12: (b7) r3 = 0
//	  13: (85) call bpf_tail_call#12
//	  14: (85) call bpf_user_rnd_u32#23440
//	  15: (77) r0 >>= 32
//	  16: (04) w0 += 2
//	  17: (95) exit
//
// The instructions 14 and 15 make a 0 that is any number to the verifier: see the
// comment at anything, generate.go.
//
// If a member continues on other verdicts than pass, main also keeps the last
// verdict in a register, and an empty slot returns a value of its own instead of
// pass. All settings are constants in the code: nothing is looked up for a packet.
// cilium/ebpf/asm generates the code, so no compiler is needed on the machine.
//
// # Sealed members
//
// The code of a sealed member is what the verifier got when the program was
// loaded: relocated (CO-RE), its functions one after the other, jumps relative,
// with the types of its functions and its source lines. Loads of maps have ids in
// the place of descriptors, so the linked code works on the maps of the running
// program.
//
// A member of up to 512 instructions, without its functions, replaces its call. Its
// exits become jumps to the code behind it. Main keeps the context and the verdict
// in registers that no such member uses, or on the stack below the members' frames;
// the verifier told their sizes. The member's functions come after main. So ten
// small members cost about as much as one program into which a compiler has inlined
// them, and a chain of one sealed member is that program.
//
// A larger member becomes a global function. The verifier checks it once by itself,
// and not once for each path through it and the members after it. freplace can
// replace such a function, and no other of a dispatcher. If the verifier
// refuses the members in main together, all become functions. If it refuses that
// too, the caller finds out which member it is and links the others without it.
//
// # Counting
//
// A live view (see package measure) uses two more dispatchers. [Counting] does what
// the plain dispatcher does, by the same slots, with a clock between the members.
// [Watched] is the plain dispatcher behind a tail call into the watch, the prog array
// with the counting dispatcher. When the watcher is gone the watch is empty, and the
// plain code behind the call runs.
//
// This is the cost of a packet in ns of a test run, with members that only pass it
// on (Linux 6.18, 2 CPUs, the best of 5 runs of
// "go test -run '^$' -bench Watching -count 5 ./internal/dispatch"; reading the clock
// took 36 ns there):
//
//	members | plain | watched | its watcher killed, before the next change
//	      1 |    40 |     117 |    41
//	      2 |    50 |     162 |    51
//	     10 |   127 |     541 |   129
//	     32 |   335 |    1511 |   326
package dispatch

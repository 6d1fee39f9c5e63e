/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The programs of the benchmarks: members that do nothing and members that do
 * work, alone, followed by a tail call, and merged by hand.
 */
#include "../../../programs/bpf/xdp.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_PROG_ARRAY = 3,
};

enum {
	/* The same buckets in each run, so that lookups take equally many instructions. */
	BPF_F_ZERO_SEED = 1 << 6,
};

enum {
	IP_UDP = 17,
};

static long (*const bpf_tail_call)(void *ctx, void *map, __u32 index) = (void *)12;

struct udp {
	__be16 source;
	__be16 dest;
	__be16 len;
	__be16 check;
};

/* The compiler does not know the value, nor does the verifier in a global function. */
#define opaque(x) asm volatile("" : "+r"(x))

#define PORTS(i)                                                               \
	struct {                                                               \
		__uint(type, BPF_MAP_TYPE_HASH);                               \
		__uint(max_entries, 16);                                       \
		__uint(map_flags, BPF_F_ZERO_SEED);                            \
		__type(key, __u32);                                            \
		__type(value, __u32);                                          \
	} ports_##i SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, 4);
	__uint(value_size, 4);
} next SEC(".maps");

/* Lists of all members but the last, for chains of these lengths. */
#define BUT_LAST_1(M)
#define BUT_LAST_2(M) M(0)
#define BUT_LAST_4(M) BUT_LAST_2(M) M(1) M(2)
#define BUT_LAST_8(M) BUT_LAST_4(M) M(3) M(4) M(5) M(6)
#define BUT_LAST_10(M) BUT_LAST_8(M) M(7) M(8)
#define BUT_LAST_16(M) BUT_LAST_10(M) M(9) M(10) M(11) M(12) M(13) M(14)
#define BUT_LAST_32(M)                                                         \
	BUT_LAST_16(M)                                                         \
	M(15) M(16) M(17) M(18) M(19) M(20) M(21) M(22) M(23) M(24) M(25)      \
	M(26) M(27) M(28) M(29) M(30)

#define ALL(M) BUT_LAST_32(M) M(31)

ALL(PORTS)

/* The number of dropped packets, on one CPU. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} dropped SEC(".maps");

/* Does nothing. */
static __always_inline int empty(struct xdp_md *ctx)
{
	int verdict = XDP_PASS;

	/* Used, lest callers do not pass it: the verifier asks for it. */
	asm volatile("" : : "r"(ctx));
	opaque(verdict);
	return verdict;
}

/* Drops UDP to the ports in a map, of which there are none. */
static __always_inline int work(struct xdp_md *ctx, void *ports)
{
	struct cursor c = packet(ctx);
	const struct ipv4 *ip;
	const struct udp *udp;
	__u32 port;

	if (take_ethernet(&c) != ETH_IPV4)
		return XDP_PASS;
	ip = c.pos;
	if (!take(&c, sizeof(*ip)) || ip->version_ihl != 0x45 || ip->protocol != IP_UDP)
		return XDP_PASS;
	udp = c.pos;
	if (!take(&c, sizeof(*udp)))
		return XDP_PASS;
	port = ntohs(udp->dest);
	return bpf_map_lookup_elem(ports, &port) ? XDP_DROP : XDP_PASS;
}

/* Drops all, and counts them: the end of a chain on a wire. */
static __always_inline int drop(void)
{
	__u64 *packets;
	__u32 zero = 0;

	packets = bpf_map_lookup_elem(&dropped, &zero);
	if (packets)
		++*packets;
	return XDP_DROP;
}

__attribute__((noinline)) int drop_last(struct xdp_md *ctx)
{
	asm volatile("" : : "r"(ctx));
	return drop();
}

#define FUNCTIONS(i)                                                           \
	__attribute__((noinline)) int empty_##i(struct xdp_md *ctx)            \
	{                                                                      \
		return empty(ctx);                                             \
	}                                                                      \
	__attribute__((noinline)) int work_##i(struct xdp_md *ctx)             \
	{                                                                      \
		return work(ctx, &ports_##i);                                  \
	}                                                                      \
	static __always_inline int inlined_empty_##i(struct xdp_md *ctx)       \
	{                                                                      \
		return empty(ctx);                                             \
	}                                                                      \
	static __always_inline int inlined_work_##i(struct xdp_md *ctx)        \
	{                                                                      \
		return work(ctx, &ports_##i);                                  \
	}

ALL(FUNCTIONS)

/* Alone. */

SEC("xdp") int alone_empty(struct xdp_md *ctx)
{
	return empty(ctx);
}

SEC("xdp") int alone_work(struct xdp_md *ctx)
{
	return work(ctx, &ports_0);
}

SEC("xdp") int alone_drop(struct xdp_md *ctx)
{
	(void)ctx;
	return drop();
}

/* In a chain of programs, each of which calls the next by itself. */

SEC("xdp") int calling_empty(struct xdp_md *ctx)
{
	int verdict = empty(ctx);

	if (verdict == XDP_PASS)
		bpf_tail_call(ctx, &next, 0);
	return verdict;
}

SEC("xdp") int calling_work(struct xdp_md *ctx)
{
	int verdict = work(ctx, &ports_0);

	if (verdict == XDP_PASS)
		bpf_tail_call(ctx, &next, 0);
	return verdict;
}

/* Merged by hand. */

#define RUN(function)                                                          \
	{                                                                      \
		int verdict = function(ctx);                                   \
									       \
		if (verdict != XDP_PASS)                                       \
			return verdict;                                        \
	}

#define RUN_EMPTY(i) RUN(empty_##i)
#define RUN_WORK(i) RUN(work_##i)
#define RUN_INLINED_EMPTY(i) RUN(inlined_empty_##i)
#define RUN_INLINED_WORK(i) RUN(inlined_work_##i)

#define MERGED(n, last)                                                        \
	SEC("xdp") int merged_empty_##n(struct xdp_md *ctx)                    \
	{                                                                      \
		BUT_LAST_##n(RUN_EMPTY) return empty_##last(ctx);              \
	}                                                                      \
	SEC("xdp") int merged_work_##n(struct xdp_md *ctx)                     \
	{                                                                      \
		BUT_LAST_##n(RUN_WORK) return work_##last(ctx);                \
	}                                                                      \
	SEC("xdp") int inlined_empty_of_##n(struct xdp_md *ctx)             \
	{                                                                      \
		BUT_LAST_##n(RUN_INLINED_EMPTY) return inlined_empty_##last(ctx); \
	}                                                                      \
	SEC("xdp") int inlined_work_of_##n(struct xdp_md *ctx)              \
	{                                                                      \
		BUT_LAST_##n(RUN_INLINED_WORK) return inlined_work_##last(ctx); \
	}

MERGED(1, 0)
MERGED(2, 1)
MERGED(4, 3)
MERGED(8, 7)
MERGED(10, 9)
MERGED(16, 15)
MERGED(32, 31)

/* On a wire: ten members, the last of which drops. */

SEC("xdp") int merged_wire_10(struct xdp_md *ctx)
{
	BUT_LAST_10(RUN_EMPTY)
	return drop_last(ctx);
}

SEC("xdp") int inlined_wire_of_10(struct xdp_md *ctx)
{
	BUT_LAST_10(RUN_INLINED_EMPTY)
	return drop();
}

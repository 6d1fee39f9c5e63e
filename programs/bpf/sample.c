/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * sample copies the start of every Nth packet to a ring buffer. See ../README.md.
 */
#include "frags.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Every Nth packet is sampled, counted on each CPU; 1 takes all, 0 none. */
volatile const __u32 every = 1000;
/* Bytes to copy of each packet, from the Ethernet header on. */
volatile const __u32 snaplen = 128;

#define MAX_SNAPLEN 512
#define RING_BYTES (256 << 10)

struct sample {
	__u64 time; /* ns, CLOCK_MONOTONIC */
	__u32 packet_len;
	__u32 captured_len;
	__u32 ifindex;
	__u32 rx_queue;
	__u8 bytes[]; /* captured_len of them; ignore what may follow in the record */
};

struct stats {
	__u64 packets;
	__u64 sampled;
	__u64 lost; /* the ring buffer was full */
	__u64 skip; /* packets until the next sample */
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, RING_BYTES);
} samples SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct stats);
} stats SEC(".maps");

/* Whether the packet is the Nth on this CPU. */
static __always_inline bool chosen(struct stats *s)
{
	if (!every)
		return false;
	if (s->skip) {
		s->skip--;
		return false;
	}
	s->skip = every - 1;
	return true;
}

/* Helpers that read packets came with 5.18, so copy byte by byte. */
static __always_inline __u32 copy(__u8 *to, struct cursor *c, __u32 max)
{
	__u32 len = 0;

	while (len < max) {
		const __u8 *byte = c->pos;

		if (!take(c, 1))
			break;
		to[len++] = *byte;
	}
	return len;
}

SEC("xdp")
int sample(struct xdp_md *ctx)
{
	struct cursor c = packet(ctx);
	__u32 max = snaplen < MAX_SNAPLEN ? snaplen : MAX_SNAPLEN;
	__u32 zero = 0;
	struct stats *s = bpf_map_lookup_elem(&stats, &zero);
	struct sample *e;

	if (!s)
		return XDP_PASS;
	s->packets++;
	if (!chosen(s))
		return XDP_PASS;

	/* snaplen is frozen before loading: for the verifier it is a constant. */
	e = bpf_ringbuf_reserve(&samples, sizeof(*e) + max, 0);
	if (!e) {
		s->lost++;
		return XDP_PASS;
	}
	s->sampled++;
	e->time = bpf_ktime_get_ns();
	e->packet_len = packet_len(ctx);
	e->ifindex = ctx->ingress_ifindex;
	e->rx_queue = ctx->rx_queue_index;
	e->captured_len = copy(e->bytes, &c, max);
	bpf_ringbuf_submit(e, 0);
	return XDP_PASS;
}

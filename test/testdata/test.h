/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the test objects need beyond the header of the shipped programs.
 * Programs and maps are named ldt_*, so that leak checks know them.
 */
#pragma once

#include "../../programs/bpf/xdp.h"

enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_PROG_ARRAY = 3,
	BPF_MAP_TYPE_ARRAY_OF_MAPS = 12,
};

#define __array(name, val) typeof(val) *name[]

/* libbpf's LIBBPF_PIN_BY_NAME. */
#define PIN_BY_NAME __uint(pinning, 1)

static long (*const bpf_tail_call)(void *ctx, void *map, __u32 index) = (void *)12;
static long (*const bpf_xdp_adjust_head)(struct xdp_md *ctx, int delta) = (void *)44;
static long (*const bpf_xdp_adjust_meta)(struct xdp_md *ctx, int delta) = (void *)54;

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct udp {
	__be16 src;
	__be16 dst;
	__be16 len;
	__be16 check;
};

/* The port that an IPv4 or IPv6 UDP datagram goes to, 0 for any other packet. */
static __always_inline __u16 udp_port(struct xdp_md *ctx)
{
	struct cursor c = packet(ctx);
	const void *ip;
	const struct udp *udp;
	__u8 protocol;

	switch (take_ethernet(&c)) {
	case ETH_IPV4:
		ip = c.pos;
		if (!take(&c, sizeof(struct ipv4)))
			return 0;
		protocol = ((const struct ipv4 *)ip)->protocol;
		break;
	case ETH_IPV6:
		ip = c.pos;
		if (!take(&c, sizeof(struct ipv6)))
			return 0;
		protocol = ((const struct ipv6 *)ip)->next_header;
		break;
	default:
		return 0;
	}
	udp = c.pos;
	if (protocol != 17 || !take(&c, sizeof(*udp)))
		return 0;
	return ntohs(udp->dst);
}

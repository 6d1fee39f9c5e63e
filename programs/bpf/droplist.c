/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * droplist drops packets by source prefix. See ../README.md.
 */
#include "frags.h"
#include "link.h"
#include "skb.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/*
 * Count the packets that each prefix drops. All CPUs share the counter's cache
 * line: turn it off where one prefix sends tens of millions a second.
 */
volatile const __u32 count_drops = 1;

#define MAX_PREFIXES (1 << 18)

struct prefix_v4 {
	__u32 len;
	__u8 addr[4];
};

struct prefix_v6 {
	__u32 len;
	__u8 addr[16];
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, MAX_PREFIXES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix_v4);
	__type(value, __u64);
} droplist_v4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, MAX_PREFIXES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix_v6);
	__type(value, __u64);
} droplist_v6 SEC(".maps");

static __always_inline bool hit(__u64 *drops, __u32 packets)
{
	if (!drops)
		return false;
	if (count_drops)
		atomic_add(drops, packets);
	return true;
}

static __always_inline bool from_ipv4(struct cursor *c, __u32 packets)
{
	const struct ipv4 *ip = c->pos;
	struct prefix_v4 key = { .len = 32 };

	if (!take(c, sizeof(*ip)))
		return false;
	__builtin_memcpy(key.addr, &ip->src, sizeof(key.addr));
	return hit(bpf_map_lookup_elem(&droplist_v4, &key), packets);
}

static __always_inline bool from_ipv6(struct cursor *c, __u32 packets)
{
	const struct ipv6 *ip = c->pos;
	struct prefix_v6 key = { .len = 128 };

	if (!take(c, sizeof(*ip)))
		return false;
	__builtin_memcpy(key.addr, &ip->src, sizeof(key.addr));
	return hit(bpf_map_lookup_elem(&droplist_v6, &key), packets);
}

/* Whether packets are from a prefix on the list. Their next header is of that type. */
static __always_inline bool listed(struct cursor *c, __u16 ethertype, __u32 packets)
{
	switch (ethertype) {
	case ETH_IPV4:
		return from_ipv4(c, packets);
	case ETH_IPV6:
		return from_ipv6(c, packets);
	default:
		return false;
	}
}

SEC("xdp")
int droplist(struct xdp_md *ctx)
{
	struct cursor c = packet(ctx);
	__u16 ethertype = take_link(&c);

	return listed(&c, ethertype, 1) ? XDP_DROP : XDP_PASS;
}

SEC("tc")
int droplist_tc(struct __sk_buff *ctx)
{
	struct cursor c = tc_packet(ctx);
	__u16 ethertype = take_link(&c);

	return listed(&c, ethertype, skb_packets(ctx)) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

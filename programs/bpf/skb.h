/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * More than xdp.h for the programs that see socket buffers, on TC and cgroup_skb:
 * the packets, and where their headers begin.
 */
#pragma once

#include "xdp.h"

enum tc_action {
	TC_ACT_UNSPEC = -1, /* the next program runs; TCX_NEXT is the same */
	TC_ACT_SHOT = 2,    /* drop; TCX_DROP is the same */
};

enum cgroup_verdict {
	CGROUP_DENY,
	CGROUP_ALLOW,
};

/* As with xdp_md, the kernel rewrites each access. */
struct __sk_buff {
	__u32 len;
	__u32 pkt_type;
	__u32 mark;
	__u32 queue_mapping;
	__u32 protocol; /* in the order of the wire */
	__u32 vlan_present;
	__u32 vlan_tci;
	__u32 vlan_proto;
	__u32 priority;
	__u32 ingress_ifindex;
	__u32 ifindex;
	__u32 tc_index;
	__u32 cb[5];
	__u32 hash;
	__u32 tc_classid;
	__u32 data;
	__u32 data_end;
	__u32 napi_id;
	__u32 family;
	__u32 remote_ip4;
	__u32 local_ip4;
	__u32 remote_ip6[4];
	__u32 local_ip6[4];
	__u32 remote_port;
	__u32 local_port;
	__u32 data_meta;
	__u64 flow_keys;
	__u64 tstamp;
	__u32 wire_len;
	__u32 gso_segs;
};

static long (*const bpf_skb_pull_data)(struct __sk_buff *skb, __u32 len) = (void *)39;

/* The part of the packet that is in one piece: at cgroup_skb, from the IP header on. */
static __always_inline struct cursor skb_packet(const struct __sk_buff *ctx)
{
	return (struct cursor){
		.pos = (const void *)(long)ctx->data,
		.end = (const void *)(long)ctx->data_end,
	};
}

static __always_inline __u16 skb_protocol(const struct __sk_buff *ctx)
{
	return ntohs(ctx->protocol);
}

/* How many packets this is on the wire: the kernel may handle several as one (GRO, GSO). */
static __always_inline __u32 skb_packets(const struct __sk_buff *ctx)
{
	return ctx->gso_segs ? ctx->gso_segs : 1;
}

/*
 * How many bytes the Ethernet header, tags and IP header can have. No more than needed: the kernel
 * may have to copy them into one piece.
 */
static __always_inline __u32 headers_len(const struct __sk_buff *ctx)
{
	switch (skb_protocol(ctx)) {
	case ETH_IPV4:
		return sizeof(struct ethernet) + sizeof(struct ipv4);
	case ETH_IPV6:
		return sizeof(struct ethernet) + sizeof(struct ipv6);
	default:
		return sizeof(struct ethernet) + MAX_VLANS * sizeof(struct vlan) + sizeof(struct ipv6);
	}
}

/* The packet at TC, with as many of these headers as it has. */
static __always_inline struct cursor tc_packet(struct __sk_buff *ctx)
{
	struct cursor c = skb_packet(ctx);
	__u32 len = headers_len(ctx);

	if (len > ctx->len)
		len = ctx->len;
	if (c.pos + len <= c.end)
		return c;
	/* Without memory for that, use the part that is in one piece. */
	bpf_skb_pull_data(ctx, len);
	return skb_packet(ctx);
}

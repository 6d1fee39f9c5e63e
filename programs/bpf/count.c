/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * count counts packets and bytes per protocol. See ../README.md.
 */
#include "frags.h"
#include "link.h"
#include "skb.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Many more than a healthy network has. A sender that makes up more cannot hide: total counts its packets. */
#define MAX_PROTOCOLS 1024

/* How many IPv6 extension headers the program looks through. */
#define MAX_EXTENSIONS 6

enum {
	IP_HOP_BY_HOP = 0,
	IP_ROUTING = 43,
	IP_FRAGMENT = 44,
	IP_AUTHENTICATION = 51,
	IP_DESTINATION = 60,
	IP_CUT_SHORT = 255, /* reserved by IANA: the IP header is incomplete */
};

/* The first bytes of every extension header. */
struct extension {
	__u8 next_header;
	__u8 len;
	__be16 frag; /* offset and flags, if it is a fragment header */
};

#define FRAG_OFFSET 0xfff8

struct protocol {
	__u16 ethertype; /* host order, behind VLAN tags; 0: an 802.3 frame with a length instead */
	__u8 protocol;   /* of IPv4 and IPv6, behind extension headers */
	__u8 pad;
};

struct traffic {
	__u64 packets;
	__u64 bytes;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, MAX_PROTOCOLS);
	__type(key, struct protocol);
	__type(value, struct traffic);
} protocols SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct traffic);
} total SEC(".maps");

static __always_inline __u8 ipv4_protocol(struct cursor *c)
{
	const struct ipv4 *ip = c->pos;

	return take(c, sizeof(*ip)) ? ip->protocol : IP_CUT_SHORT;
}

/*
 * Follows the headers to the first one that is not an extension, or as far
 * as the packet and MAX_EXTENSIONS allow.
 */
static __always_inline __u8 ipv6_protocol(struct cursor *c)
{
	const struct ipv6 *ip = c->pos;
	__u8 protocol;

	if (!take(c, sizeof(*ip)))
		return IP_CUT_SHORT;
	protocol = ip->next_header;

	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		const struct extension *ext = c->pos;
		__u32 len;

		if (!take(c, sizeof(*ext)))
			return protocol;

		switch (protocol) {
		case IP_HOP_BY_HOP:
		case IP_ROUTING:
		case IP_DESTINATION:
			len = (ext->len + 1) * 8;
			break;
		case IP_AUTHENTICATION:
			len = (ext->len + 2) * 4;
			break;
		case IP_FRAGMENT:
			/* What follows a later fragment's header is data. */
			if (ntohs(ext->frag) & FRAG_OFFSET)
				return ext->next_header;
			len = 8;
			break;
		default:
			return protocol;
		}
		protocol = ext->next_header;
		if (!take(c, len - sizeof(*ext)))
			return protocol;
	}
	return protocol;
}

static __always_inline struct traffic *find_traffic(const struct protocol *key)
{
	struct traffic none = {};
	struct traffic *traffic = bpf_map_lookup_elem(&protocols, key);

	if (traffic)
		return traffic;
	/* Another CPU may be first; all CPUs use the same entry. */
	bpf_map_update_elem(&protocols, key, &none, BPF_NOEXIST);
	return bpf_map_lookup_elem(&protocols, key);
}

static __always_inline void add(struct traffic *traffic, __u32 packets, __u64 bytes)
{
	if (!traffic)
		return;
	traffic->packets += packets;
	traffic->bytes += bytes;
}

/* Counts packets. Their next header is of that type. */
static __always_inline void account(struct cursor *c, __u16 ethertype, __u32 packets, __u64 bytes)
{
	struct protocol key = { .ethertype = ethertype };
	__u32 zero = 0;

	if (key.ethertype < ETH_MIN_TYPE)
		key.ethertype = 0;
	else if (key.ethertype == ETH_IPV4)
		key.protocol = ipv4_protocol(c);
	else if (key.ethertype == ETH_IPV6)
		key.protocol = ipv6_protocol(c);

	add(find_traffic(&key), packets, bytes);
	add(bpf_map_lookup_elem(&total, &zero), packets, bytes);
}

SEC("xdp")
int count(struct xdp_md *ctx)
{
	struct cursor c = packet(ctx);
	__u16 ethertype = take_link(&c);

	account(&c, ethertype, 1, packet_len(ctx));
	return XDP_PASS;
}

SEC("tc")
int count_tc(struct __sk_buff *ctx)
{
	struct cursor c = tc_packet(ctx);
	__u16 ethertype = take_link(&c);

	account(&c, ethertype, skb_packets(ctx), ctx->len);
	return TC_ACT_UNSPEC;
}

SEC("cgroup/skb")
int count_cgroup(struct __sk_buff *ctx)
{
	struct cursor c = skb_packet(ctx);

	account(&c, skb_protocol(ctx), skb_packets(ctx), ctx->len);
	return CGROUP_ALLOW;
}

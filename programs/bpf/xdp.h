/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The kernel's ABI for XDP programs, in part for all programs in this folder, and
 * a bounds-checked parser for Ethernet, VLAN tags, IPv4 and IPv6.
 *
 * The kernel's and libbpf's headers are left out on purpose: they differ from
 * machine to machine, but the objects must not differ.
 */
#pragma once

/* Types */

typedef _Bool bool;
typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;

/* In the order of the wire, on every machine. */
typedef __u16 __be16;
typedef __u32 __be32;

#define NULL ((void *)0)
#define false 0
#define true 1

enum xdp_action {
	XDP_ABORTED,
	XDP_DROP,
	XDP_PASS,
};

/* The kernel's own fields are elsewhere: it rewrites each access to these. */
struct xdp_md {
	__u32 data;
	__u32 data_end;
	__u32 data_meta;
	__u32 ingress_ifindex;
	__u32 rx_queue_index;
};

/* The kernel finds the lock in a map's value by the name of this type. */
struct bpf_spin_lock {
	__u32 val;
};

/* Declarations */

#define SEC(name) __attribute__((section(name), used))
#define __always_inline inline __attribute__((always_inline))

/* A map is described in BTF: numbers as array lengths, types as pointers. */
#define __uint(name, val) int (*name)[val]
#define __type(name, val) typeof(val) *name

enum {
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_HASH = 5,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_MAP_TYPE_LPM_TRIE = 11,
	BPF_MAP_TYPE_RINGBUF = 27,
};

enum {
	BPF_F_NO_PREALLOC = 1, /* map flag */
	BPF_NOEXIST = 1,       /* update flag */
};

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*const bpf_map_update_elem)(void *map, const void *key, const void *value,
					 __u64 flags) = (void *)2;
static __u64 (*const bpf_ktime_get_ns)(void) = (void *)5;
static long (*const bpf_spin_lock)(struct bpf_spin_lock *lock) = (void *)93;
static long (*const bpf_spin_unlock)(struct bpf_spin_lock *lock) = (void *)94;
static void *(*const bpf_ringbuf_reserve)(void *ringbuf, __u64 size, __u64 flags) = (void *)131;
static void (*const bpf_ringbuf_submit)(void *record, __u64 flags) = (void *)132;

/*
 * An add whose result is not used is one instruction on every kernel. The
 * atomics that return something came with 5.12: do without them.
 */
#define atomic_add(ptr, val) ((void)__sync_fetch_and_add(ptr, val))
#define READ_ONCE(x) (*(const volatile typeof(x) *)&(x))

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define ntohs(x) __builtin_bswap16(x)
#define htonl(x) __builtin_bswap32(x)
#else
#define ntohs(x) ((__u16)(x))
#define htonl(x) ((__u32)(x))
#endif

/* Packets */

enum ethertype {
	ETH_MIN_TYPE = 0x0600, /* a smaller value is a length */
	ETH_IPV4 = 0x0800,
	ETH_8021Q = 0x8100,
	ETH_IPV6 = 0x86dd,
	ETH_8021AD = 0x88a8,
};

struct ethernet {
	__u8 dst[6];
	__u8 src[6];
	__be16 type;
};

struct vlan {
	__be16 tci;
	__be16 type;
};

struct ipv4 {
	__u8 version_ihl;
	__u8 tos;
	__be16 len;
	__be16 id;
	__be16 frag;
	__u8 ttl;
	__u8 protocol;
	__be16 check;
	__be32 src;
	__be32 dst;
};

struct ipv6 {
	__be32 version_class_flow;
	__be16 len;
	__u8 next_header;
	__u8 hop_limit;
	__be32 src[4];
	__be32 dst[4];
};

/* How many VLAN tags the programs look through: one, and one more of a provider. */
#define MAX_VLANS 2

/* What is left of a packet. */
struct cursor {
	const void *pos;
	const void *end;
};

static __always_inline struct cursor packet(const struct xdp_md *ctx)
{
	return (struct cursor){
		.pos = (const void *)(long)ctx->data,
		.end = (const void *)(long)ctx->data_end,
	};
}

/*
 * Takes len bytes off the front; false, and nothing taken, if they are missing.
 * The taken bytes are where pos pointed before. Returning that pointer, or NULL,
 * would compare a packet pointer with zero, which verifiers do not like.
 */
static __always_inline bool take(struct cursor *c, __u32 len)
{
	if (c->pos + len > c->end)
		return false;
	c->pos += len;
	return true;
}

/*
 * Takes the Ethernet header and the VLAN tags, and returns the type of the next
 * header in host order. With more than MAX_VLANS tags, or a tag that is cut short,
 * this is the tag's own type. Without an Ethernet header it is 0.
 */
static __always_inline __u16 take_ethernet(struct cursor *c)
{
	const struct ethernet *eth = c->pos;
	__u16 type;

	if (!take(c, sizeof(*eth)))
		return 0;
	type = ntohs(eth->type);

	for (int i = 0; i < MAX_VLANS; i++) {
		const struct vlan *tag = c->pos;

		if (type != ETH_8021Q && type != ETH_8021AD)
			break;
		if (!take(c, sizeof(*tag)))
			break;
		type = ntohs(tag->type);
	}
	return type;
}

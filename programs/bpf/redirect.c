/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * redirect sends connect(2) to another address and port. See ../README.md.
 */
#include "xdp.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Only connections of this IP protocol; 0: of all protocols with ports, such as TCP and UDP. */
volatile const __u8 protocol = 0;

struct ipv6_addr {
	__be32 words[4];
};

/*
 * One destination besides those in the maps, for users with only one. Zero means any address
 * or port, or the same as before.
 */
volatile const __be32 from_ip = 0;
volatile const __be32 to_ip = 0;
volatile const __u16 from_port = 0;
volatile const __u16 to_port = 0;
volatile const struct ipv6_addr from_ip6 = {};
volatile const struct ipv6_addr to_ip6 = {};

#define MAX_DESTINATIONS (1 << 14)

enum {
	BPF_MAP_TYPE_HASH = 1,
};

/* The only verdict: this program does not decide whether to connect. */
#define CONNECT 1

/* As with xdp_md, the kernel rewrites each access. All fields are in the order of the wire. */
struct bpf_sock_addr {
	__u32 user_family;
	__u32 user_ip4;
	__u32 user_ip6[4];
	__u32 user_port;
	__u32 family;
	__u32 type;
	__u32 protocol;
};

struct destination_v4 {
	__u8 addr[4]; /* 0.0.0.0: any */
	__u16 port;   /* 0: any */
};

struct destination_v6 {
	__u8 addr[16]; /* ::: any */
	__u16 port;    /* 0: any */
};

struct target_v4 {
	__u8 addr[4]; /* 0.0.0.0: the same */
	__u16 port;   /* 0: the same */
	__u16 pad;
	__u64 connects;
};

struct target_v6 {
	__u8 addr[16]; /* ::: the same */
	__u16 port;    /* 0: the same */
	__u16 pad[3];
	__u64 connects;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_DESTINATIONS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct destination_v4);
	__type(value, struct target_v4);
} redirect_v4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_DESTINATIONS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct destination_v6);
	__type(value, struct target_v6);
} redirect_v6 SEC(".maps");

/* The constant is volatile, and so cannot be assigned as a whole. */
static __always_inline struct ipv6_addr constant(const volatile struct ipv6_addr *a)
{
	return (struct ipv6_addr){ { a->words[0], a->words[1], a->words[2], a->words[3] } };
}

static __always_inline bool is_any(const struct ipv6_addr *a)
{
	return !(a->words[0] | a->words[1] | a->words[2] | a->words[3]);
}

static __always_inline bool same(const struct ipv6_addr *a, const struct ipv6_addr *b)
{
	return a->words[0] == b->words[0] && a->words[1] == b->words[1] && a->words[2] == b->words[2] &&
	       a->words[3] == b->words[3];
}

/* Whether the constants have addresses of this version. Without any address, the ports are for both versions. */
static __always_inline bool constants_v4(void)
{
	return from_ip || to_ip;
}

static __always_inline bool constants_v6(void)
{
	const struct ipv6_addr from = constant(&from_ip6), to = constant(&to_ip6);

	return !is_any(&from) || !is_any(&to);
}

/* The most specific entry: of several that fit, an address goes before a port. */
static __always_inline struct target_v4 *find_v4(__be32 addr, __u16 port)
{
	for (int any = 0; any < 4; any++) {
		struct destination_v4 key = {};
		struct target_v4 *target;

		if (!(any & 2))
			__builtin_memcpy(key.addr, &addr, sizeof(key.addr));
		if (!(any & 1))
			key.port = port;
		target = bpf_map_lookup_elem(&redirect_v4, &key);
		if (target)
			return target;
	}
	return NULL;
}

static __always_inline struct target_v6 *find_v6(const struct ipv6_addr *addr, __u16 port)
{
	for (int any = 0; any < 4; any++) {
		struct destination_v6 key = {};
		struct target_v6 *target;

		if (!(any & 2))
			__builtin_memcpy(key.addr, addr, sizeof(key.addr));
		if (!(any & 1))
			key.port = port;
		target = bpf_map_lookup_elem(&redirect_v6, &key);
		if (target)
			return target;
	}
	return NULL;
}

/* Changes the destination, if an entry or the constants say so. */
static __always_inline bool translate_v4(__be32 *addr, __u16 *port)
{
	struct target_v4 *target = find_v4(*addr, *port);
	__be32 new_addr;
	__u16 new_port;

	if (target) {
		atomic_add(&target->connects, 1);
		__builtin_memcpy(&new_addr, target->addr, sizeof(new_addr));
		new_port = target->port;
	} else {
		if (constants_v6() && !constants_v4())
			return false;
		if (from_ip && *addr != from_ip)
			return false;
		if (from_port && *port != from_port)
			return false;
		new_addr = to_ip;
		new_port = to_port;
	}
	if (new_addr)
		*addr = new_addr;
	if (new_port)
		*port = new_port;
	return new_addr || new_port;
}

static __always_inline bool translate_v6(struct ipv6_addr *addr, __u16 *port)
{
	const struct ipv6_addr from = constant(&from_ip6);
	struct target_v6 *target = find_v6(addr, *port);
	struct ipv6_addr new_addr;
	__u16 new_port;

	if (target) {
		atomic_add(&target->connects, 1);
		__builtin_memcpy(&new_addr, target->addr, sizeof(new_addr));
		new_port = target->port;
	} else {
		if (constants_v4() && !constants_v6())
			return false;
		if (!is_any(&from) && !same(addr, &from))
			return false;
		if (from_port && *port != from_port)
			return false;
		new_addr = constant(&to_ip6);
		new_port = to_port;
	}
	if (!is_any(&new_addr))
		*addr = new_addr;
	if (new_port)
		*port = new_port;
	return !is_any(&new_addr) || new_port;
}

static __always_inline bool concerned(const struct bpf_sock_addr *ctx)
{
	return !protocol || ctx->protocol == protocol;
}

SEC("cgroup/connect4")
int redirect4(struct bpf_sock_addr *ctx)
{
	__be32 addr = ctx->user_ip4;
	__u16 port = ntohs(READ_ONCE(ctx->user_port));

	if (concerned(ctx) && translate_v4(&addr, &port)) {
		ctx->user_ip4 = addr;
		ctx->user_port = ntohs(port);
	}
	return CONNECT;
}

SEC("cgroup/connect6")
int redirect6(struct bpf_sock_addr *ctx)
{
	struct ipv6_addr addr = { { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] } };
	__u16 port = ntohs(READ_ONCE(ctx->user_port));

	if (!concerned(ctx))
		return CONNECT;

	/* An IPv6 socket connects to IPv4 at ::ffff:192.0.2.1, and no program of connect4 is asked. */
	if (!addr.words[0] && !addr.words[1] && addr.words[2] == htonl(0xffff)) {
		if (!translate_v4(&addr.words[3], &port))
			return CONNECT;
	} else if (!translate_v6(&addr, &port)) {
		return CONNECT;
	}
	ctx->user_ip6[0] = addr.words[0];
	ctx->user_ip6[1] = addr.words[1];
	ctx->user_ip6[2] = addr.words[2];
	ctx->user_ip6[3] = addr.words[3];
	ctx->user_port = ntohs(port);
	return CONNECT;
}

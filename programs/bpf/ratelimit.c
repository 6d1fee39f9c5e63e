/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * ratelimit drops the packets that a source sends beyond a rate. See ../README.md.
 *
 * A token bucket needs no tokens. The time at which it would be full again says
 * the same in one number, and never needs a refill. Taking a token moves that
 * time forward by the interval between two packets at the rate. The bucket is
 * empty when the time is a whole burst away.
 *
 * Every check and update is made under a lock, so that no two CPUs spend the
 * same token. The lock cannot be in the bucket: LRU maps take no locks, and
 * compare-and-swap came with 5.12. The lock is one of an array, chosen by the
 * source's address. A flood rarely takes it: an empty bucket is seen without
 * the lock, because its time only moves forward.
 */
#include "frags.h"
#include "link.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Packets a second that a source may send; 0 sets no limit. */
volatile const __u32 rate = 10000;
/* Packets that a source may send at once; 0 counts as 1. */
volatile const __u32 burst = 10000;
/* The leading bits of an address that make a source. On the Internet, an IPv6 source has 64. */
volatile const __u32 bits_v4 = 32;
volatile const __u32 bits_v6 = 128;

#define NSEC_PER_SEC 1000000000u
#define MAX_SOURCES (1 << 16)
#define LOCK_BITS 10

/* An IPv6 address, or an IPv4 address mapped into one: ::ffff:192.0.2.1. */
struct source {
	__u8 addr[16];
};

struct bucket {
	__u64 full_at; /* ns, CLOCK_MONOTONIC */
	__u64 passed;
	__u64 dropped;
};

/* One cache line each. */
struct lock {
	struct bpf_spin_lock lock;
	__u32 pad[15];
};

struct totals {
	__u64 passed;
	__u64 dropped;
	__u64 untracked; /* passed because there was no memory for a bucket */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_SOURCES);
	__type(key, struct source);
	__type(value, struct bucket);
} buckets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 << LOCK_BITS);
	__type(key, __u32);
	__type(value, struct lock);
} locks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct totals);
} totals SEC(".maps");

/* Keeps only the first bits of one word of an address. */
static __always_inline __be32 keep(__be32 word, int bits)
{
	if (bits <= 0)
		return 0;
	if (bits >= 32)
		return word;
	return word & htonl(~0u << (32 - bits));
}

/* Finds the source of the packet; false if the packet is not IP. */
static __always_inline bool take_source(struct cursor *c, __be32 source[4])
{
	__u16 type = take_link(c);

	if (type == ETH_IPV4) {
		const struct ipv4 *ip = c->pos;

		if (!take(c, sizeof(*ip)))
			return false;
		source[2] = htonl(0xffff);
		source[3] = keep(ip->src, bits_v4);
		return true;
	}
	if (type == ETH_IPV6) {
		const struct ipv6 *ip = c->pos;

		if (!take(c, sizeof(*ip)))
			return false;
		for (int i = 0; i < 4; i++)
			source[i] = keep(ip->src[i], (int)bits_v6 - 32 * i);
		return true;
	}
	return false;
}

static __always_inline struct bucket *find_bucket(const void *source)
{
	struct bucket full = {};
	struct bucket *bucket = bpf_map_lookup_elem(&buckets, source);

	if (bucket)
		return bucket;
	/* Another CPU may be first: then use its bucket. */
	bpf_map_update_elem(&buckets, source, &full, BPF_NOEXIST);
	return bpf_map_lookup_elem(&buckets, source);
}

static __always_inline struct lock *find_lock(const __be32 source[4])
{
	__u32 hash = (source[0] ^ source[1] ^ source[2] ^ source[3]) * 0x9e3779b1;
	__u32 index = hash >> (32 - LOCK_BITS);

	return bpf_map_lookup_elem(&locks, &index);
}

/*
 * Takes a token; false if there is none. If the map gives the bucket to another
 * source meanwhile, that source loses a token: a rare and small injustice.
 */
static __always_inline bool take_token(struct bucket *bucket, struct lock *lock)
{
	__u32 interval = rate ? NSEC_PER_SEC / rate : 0;
	__u64 now = bpf_ktime_get_ns();
	__u64 latest = now + (__u64)interval * (burst ? burst - 1 : 0);
	bool taken = false;

	if (READ_ONCE(bucket->full_at) > latest)
		return false;

	bpf_spin_lock(&lock->lock);
	if (bucket->full_at <= latest) {
		bucket->full_at = (bucket->full_at > now ? bucket->full_at : now) + interval;
		bucket->passed++;
		taken = true;
	}
	bpf_spin_unlock(&lock->lock);
	return taken;
}

SEC("xdp")
int ratelimit(struct xdp_md *ctx)
{
	struct cursor c = packet(ctx);
	__be32 source[4] = {};
	__u32 zero = 0;
	struct bucket *bucket;
	struct totals *total;
	struct lock *lock;

	if (!take_source(&c, source))
		return XDP_PASS;

	bucket = find_bucket(source);
	lock = find_lock(source);
	total = bpf_map_lookup_elem(&totals, &zero);
	if (!total || !lock)
		return XDP_PASS;
	if (!bucket) {
		total->untracked++;
		return XDP_PASS;
	}
	if (!take_token(bucket, lock)) {
		atomic_add(&bucket->dropped, 1);
		total->dropped++;
		return XDP_DROP;
	}
	total->passed++;
	return XDP_PASS;
}

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the compiler makes of programs beyond one function and its maps. Each writes down what it found, and
 * drops UDP datagrams to port 7000.
 */
#include "test.h"

#define __noinline __attribute__((noinline))

volatile const __u16 port = 7000;
volatile const __u32 step = 1;

__u64 found[4]; /* .bss */

/* CO-RE: what the kernel's types are like is put into the instructions when they are loaded. */

struct task_struct {
	int pid;
	int ldt_no_such_field;
} __attribute__((preserve_access_index));

struct ldt_no_such_type {
	int x;
} __attribute__((preserve_access_index));

enum { BYTE_OFFSET, BYTE_SIZE, EXISTS };
enum { TYPE_EXISTS, TYPE_SIZE };

#define field(type, name, what) __builtin_preserve_field_info(((type *)0)->name, what)
#define type_info(type, what) __builtin_preserve_type_info(*(typeof(type) *)0, what)

SEC("xdp")
int ldt_core(struct xdp_md *ctx)
{
	found[0] = field(struct task_struct, pid, BYTE_OFFSET);
	found[1] = type_info(struct task_struct, TYPE_SIZE);
	found[2] = field(struct task_struct, ldt_no_such_field, EXISTS);
	found[3] = type_info(struct ldt_no_such_type, TYPE_EXISTS) + 2 * field(struct task_struct, pid, EXISTS);
	return udp_port(ctx) == port ? XDP_DROP : XDP_PASS;
}

/* Functions of its own: two that call each other's kin, and one that is global. */

static __noinline __u64 deeper(__u64 n)
{
	atomic_add(&found[0], step);
	return n + 1;
}

static __noinline __u64 deep(__u64 n)
{
	return deeper(n) * 2;
}

__noinline int ldt_any_port(struct xdp_md *ctx)
{
	return udp_port(ctx);
}

SEC("xdp")
int ldt_functions(struct xdp_md *ctx)
{
	found[1] = deep(found[1] & 0xff);
	return ldt_any_port(ctx) == port ? XDP_DROP : XDP_PASS;
}

/* A function that the kernel calls. */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, __u64);
} ldt_numbers SEC(".maps");

static long (*const bpf_for_each_map_elem)(void *map, void *callback, void *ctx, __u64 flags) = (void *)164;

static long add(void *map, const __u32 *key, __u64 *value, __u64 *sum)
{
	(void)map;
	*sum += *value + *key;
	return 0;
}

SEC("xdp")
int ldt_callback(struct xdp_md *ctx)
{
	__u64 sum = 0;

	bpf_for_each_map_elem(&ldt_numbers, add, &sum, 0);
	found[0] = sum;
	return udp_port(ctx) == port ? XDP_DROP : XDP_PASS;
}

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What of the kernel the iterators look at. Offsets are those of the running kernel:
 * the loader relocates them by its BTF, so only names and types matter here.
 */
#pragma once

typedef unsigned char __u8;
typedef unsigned int __u32;
typedef unsigned long long __u64;

#define SEC(name) __attribute__((section(name), used))
#define __always_inline inline __attribute__((always_inline))

enum bpf_map_type {
	BPF_MAP_TYPE_PROG_ARRAY = 3,
};

enum bpf_prog_type {
	BPF_PROG_TYPE_UNSPEC = 0,
};

enum bpf_link_type {
	BPF_LINK_TYPE_TRACING = 2,
	BPF_LINK_TYPE_XDP = 6,
};

enum {
	BPF_FS_MAGIC = 0xcafe4a11,
	NSFS_MAGIC = 0x6e736673,
};

struct seq_file;

static __u64 (*const bpf_get_current_pid_tgid)(void) = (void *)14;
static __u64 (*const bpf_get_current_task)(void) = (void *)35;
static long (*const bpf_probe_read_kernel)(void *dst, __u32 size, const void *src) = (void *)113;
static long (*const bpf_seq_write)(struct seq_file *m, const void *data, __u32 len) = (void *)127;

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	long counter;
} atomic64_t;

struct upid {
	int nr;
};

struct pid {
	unsigned int level;
	struct upid numbers[1];
};

struct task_struct {
	int tgid;
	struct task_struct *group_leader;
	struct pid *thread_pid;
	struct files_struct *files;
};

struct super_block {
	unsigned long s_magic;
};

struct inode {
	struct super_block *i_sb;
};

struct file {
	void *f_op;
	struct inode *f_inode;
	void *private_data;
};

struct bpf_map {
	enum bpf_map_type map_type;
	__u32 max_entries;
	__u32 id;
	atomic64_t refcnt;
	atomic64_t usercnt;
};

struct bpf_array {
	void *ptrs[0];
};

struct bpf_prog_aux {
	atomic64_t refcnt;
	__u32 used_map_cnt;
	__u32 id;
	struct bpf_prog *dst_prog;
	struct bpf_map **used_maps;
};

struct bpf_prog {
	enum bpf_prog_type type;
	struct bpf_prog_aux *aux;
};

struct bpf_link {
	atomic64_t refcnt;
	__u32 id;
	enum bpf_link_type type;
	struct bpf_prog *prog;
};

struct bpf_tracing_link {
	struct bpf_prog *tgt_prog;
};

struct bpf_xdp_link {
	struct net_device *dev;
};

struct bpf_iter_meta {
	struct seq_file *seq;
};

#pragma clang attribute pop

/* Each member is a pointer in a union of 8 bytes, on all machines. */
struct bpf_iter__task_file {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	__u32 fd;
	struct file *file;
};

struct bpf_iter__bpf_link {
	struct bpf_iter_meta *meta;
	struct bpf_link *link;
};

struct bpf_iter__bpf_prog {
	struct bpf_iter_meta *meta;
	struct bpf_prog *prog;
};

struct bpf_iter__bpf_map {
	struct bpf_iter_meta *meta;
	struct bpf_map *map;
};

/* The address of a field, and its value, where the verifier does not know the type of p. */
#define FIELD(p, field) ((void *)__builtin_preserve_access_index(&(p)->field))
#define READ(p, field)                                                              \
	({                                                                          \
		typeof((p)->field) value = {};                                      \
		bpf_probe_read_kernel(&value, sizeof(value), FIELD(p, field));      \
		value;                                                              \
	})

#define EXISTS(type, field) __builtin_preserve_field_info(((type *)0)->field, 2)
#define OFFSET(type, field) __builtin_preserve_field_info(((type *)0)->field, 0)
#define SIZE(type) __builtin_preserve_type_info(*(type *)0, 1)

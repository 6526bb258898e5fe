// Package load turns a tree of CUE files (the CUE language specification, cuelang.org/docs/reference/spec) into a
// *schema.Fleet, or into all that is wrong with it, each with its place.
//
// A commit is hostile input, and an evaluation of CUE can neither be cancelled nor be kept from filling the memory. So
// it happens in a child process with a deadline and a memory limit; this package is both sides of it:
//
//	Loader.Load                        the child (Evaluate)
//	collect: files of package fleet
//	shards:  one for each leaf directory
//	         not in the cache  ──stdin──▶  limit own process
//	                                       per shard, several at once: parse, build, unify with the
//	                                       schema, validate host by host, compute role nodes
//	         decode            ◀─stdout──  one JSON line when a shard begins, one with its result
//	merge, check across hosts
//
// A shard is a leaf directory with the files of its parent directories: what CUE itself calls an instance of a
// package. Shards do not see one another, so they can be evaluated in parallel and kept by the hash of their files.
package load

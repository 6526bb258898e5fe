// Package conformance tries the iSCSI target with programs that others wrote: iscsi-test-cu of libiscsi, which has 230
// tests of RFC 7143, SPC and SBC; QEMU's initiator; tgt, which it is measured beside. All of it is in its tests.
package conformance

// Package lun has what logical units keep their blocks on: files that are only read, files that are written, and
// copy-on-write deltas over files that are only read.
package lun

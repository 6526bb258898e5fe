package iscsi

// A Target is a name with logical units.
type Target struct{}

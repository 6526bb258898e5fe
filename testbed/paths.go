package testbed

import "path/filepath"

// DiskPath is the file that is a machine's disk. Only a machine that is off may be written to.
func (c *Client) DiskPath(node string) string { return filepath.Join(c.dir, nodesDir, node, diskFile) }

// Binary is the troupe program that the lab runs.
func (c *Client) Binary() string { return c.rec.Binary }

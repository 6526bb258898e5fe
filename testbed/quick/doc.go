// Package quick is a lab whose machines boot in seconds, for tests of what a node does with its releases and its cache. All of
// troupe is real: the server, its builds, the agent, a Debian kernel, DHCP, the cache on a disk. What is left out are the
// firmware (testbed.Direct) and the distribution: the base is a system of a few hundred lines (testbed/quick/init), which the
// server builds in a second, since mmdebstrap is one of our own (testbed/quick/mmdebstrap).
//
//	lab := quick.Start(t, quick.Config{})   // a fleet of one host, n1, with role a
//	lab.On("n1")
//	lab.AwaitHealthy("n1")
//	lab.Role("n1", "b")                     // commits and pushes
//	lab.AwaitRole("n1", "b")
//	lab.Off("n1")                           // a power cut
//	lab.Flip("n1", lab.Running("n1").Content.Base.Digest, 4096*100)  // a bit of a cached image goes bad
package quick

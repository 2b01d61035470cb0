// Command etcd is a server of the version that go.mod pins, built for the tests of the registry's
// store. go.sum says what every module of it must be; `make etcd` builds it.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}

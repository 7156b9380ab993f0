from neoxconv.cli import main

raise SystemExit(main())

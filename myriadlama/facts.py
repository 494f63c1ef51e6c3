"""Facts that a small language model may know, with templates to ask for them.

They were written for this repository. [X] is the subject and [Y] the answer, which a prompt shows
as [MASK]. Manual templates are worded with care, automatic ones more loosely. The answers of a
subject are separated by |. Each of them is correct; the first is the one that examples show.
"""

RELATIONS = {
    "capital": {
        "label": "capital of a country",
        "manual": (
            "The capital of [X] is [Y].",
            "The capital city of [X] is called [Y].",
            "Which city is the capital of [X]? [Y].",
            "[X] is governed from its capital, [Y].",
            "[Y] is the capital of [X].",
        ),
        "auto": (
            "The government of [X] sits in [Y].",
            "[X] has its capital in the city of [Y].",
            "If you visit the capital of [X], you are in [Y].",
            "The main city of government in [X] is [Y].",
            "The parliament of [X] is found in [Y].",
        ),
        "facts": (
            "Japan=Tokyo; France=Paris; Germany=Berlin; Italy=Rome; Spain=Madrid; "
            "Portugal=Lisbon; Russia=Moscow; Egypt=Cairo; Greece=Athens; Austria=Vienna; "
            "Poland=Warsaw; Hungary=Budapest; Sweden=Stockholm; Norway=Oslo; Denmark=Copenhagen; "
            "Finland=Helsinki; Ireland=Dublin; Turkey=Ankara; Iran=Tehran; Iraq=Baghdad; "
            "China=Beijing|Peking; Thailand=Bangkok; Cuba=Havana; Peru=Lima; Canada=Ottawa; "
            "Kenya=Nairobi; Chile=Santiago; Belgium=Brussels"
        ),
    },
    "language": {
        "label": "main language of a country",
        "manual": (
            "The official language of [X] is [Y].",
            "Most people in [X] speak [Y].",
            "Which language is spoken in [X]? [Y].",
            "In [X], people speak [Y].",
            "[Y] is the main language of [X].",
        ),
        "auto": (
            "Newspapers in [X] are written in [Y].",
            "To talk with people in [X], learn [Y].",
            "Schools in [X] teach in [Y].",
            "The mother tongue of most people from [X] is [Y].",
            "The language you hear in the streets of [X] is [Y].",
        ),
        "facts": (
            "France=French; Germany=German; Austria=German; Italy=Italian; Spain=Spanish; "
            "Mexico=Spanish; Argentina=Spanish; Brazil=Portuguese; Portugal=Portuguese; "
            "Japan=Japanese; Russia=Russian; Poland=Polish; Hungary=Hungarian; Sweden=Swedish; "
            "Norway=Norwegian; Denmark=Danish; Finland=Finnish; Greece=Greek; Turkey=Turkish; "
            "Egypt=Arabic; Iraq=Arabic; Iran=Persian|Farsi; Thailand=Thai; Vietnam=Vietnamese; "
            "Australia=English; Jamaica=English; Israel=Hebrew; China=Chinese|Mandarin"
        ),
    },
    "continent": {
        "label": "continent of a country",
        "manual": (
            "[X] is a country in [Y].",
            "The continent of [X] is [Y].",
            "On which continent is [X]? [Y].",
            "[X] lies on the continent of [Y].",
            "[X] belongs to the continent of [Y].",
        ),
        "auto": (
            "You find [X] on a map of [Y].",
            "A trip to [X] is a trip to [Y].",
            "Geographically, [X] is a part of [Y].",
            "Among the countries of [X]'s size, it is one in [Y].",
            "The land of [X] is in the part of the world called [Y].",
        ),
        "facts": (
            "Kenya=Africa; Nigeria=Africa; Ghana=Africa; Morocco=Africa; Ethiopia=Africa; "
            "Zambia=Africa; Japan=Asia; China=Asia; India=Asia; Thailand=Asia; Vietnam=Asia; "
            "Mongolia=Asia; Nepal=Asia; France=Europe; Poland=Europe; Norway=Europe; "
            "Greece=Europe; Austria=Europe; Portugal=Europe; Sweden=Europe; "
            "Brazil=South America|America; Peru=South America|America; "
            "Chile=South America|America; Canada=North America|America; "
            "Cuba=North America|America; Mexico=North America|America; Senegal=Africa; "
            "Pakistan=Asia"
        ),
    },
    "currency": {
        "label": "currency of a country",
        "manual": (
            "The currency of [X] is the [Y].",
            "In [X], people pay with the [Y].",
            "What is the currency of [X]? The [Y].",
            "Prices in [X] are given in the [Y].",
            "Money in [X] is called the [Y].",
        ),
        "auto": (
            "Shops in [X] take the [Y].",
            "The central bank of [X] issues the [Y].",
            "Wages in [X] are paid in the [Y].",
            "Before a journey to [X], change your money into the [Y].",
            "The national money of [X] has the name [Y].",
        ),
        "facts": (
            "Japan=yen; India=rupee; China=yuan|renminbi; Russia=ruble|rouble; Germany=euro; "
            "France=euro; Italy=euro; Spain=euro; Brazil=real; Mexico=peso; Chile=peso; "
            "Argentina=peso; Canada=dollar; Australia=dollar; Turkey=lira; Poland=zloty; "
            "Hungary=forint; Sweden=krona; Norway=krone; Denmark=krone; Switzerland=franc; "
            "Thailand=baht; Israel=shekel; Vietnam=dong; Egypt=pound; Kenya=shilling; "
            "South Africa=rand; Saudi Arabia=riyal"
        ),
    },
    "country": {
        "label": "country of a city",
        "manual": (
            "[X] is a city in [Y].",
            "The city of [X] is in [Y].",
            "In which country is [X]? [Y].",
            "[X] is located in the country of [Y].",
            "[X] belongs to [Y].",
        ),
        "auto": (
            "People from [X] hold a passport of [Y].",
            "A train to [X] takes you to [Y].",
            "[X] is one of the larger cities of [Y].",
            "The flag over the town hall of [X] is that of [Y].",
            "On a map, [X] lies within the borders of [Y].",
        ),
        "facts": (
            "Munich=Germany; Hamburg=Germany; Lyon=France; Marseille=France; Milan=Italy; "
            "Naples=Italy; Barcelona=Spain; Seville=Spain; Porto=Portugal; Osaka=Japan; "
            "Kyoto=Japan; Mumbai=India; Kolkata=India; Shanghai=China; "
            "Chicago=United States|USA|America|U.S.; Boston=United States|USA|America|U.S.; "
            "Toronto=Canada; Montreal=Canada; Sydney=Australia; Melbourne=Australia; "
            "Istanbul=Turkey; Krakow=Poland; Salzburg=Austria; Geneva=Switzerland; "
            "Alexandria=Egypt; Manchester=England|United Kingdom|UK|Britain; Antwerp=Belgium; "
            "Lagos=Nigeria"
        ),
    },
    "author": {
        "label": "author of a book",
        "manual": (
            "The author of [X] is [Y].",
            "[X] was written by [Y].",
            "Who wrote [X]? [Y].",
            "[X] is a work by [Y].",
            "The writer of [X] was [Y].",
        ),
        "auto": (
            "On the cover of [X] stands the name [Y].",
            "[X] came from the pen of [Y].",
            "Readers of [X] know the writer [Y].",
            "Among the books of its author, [X] made famous [Y].",
            "The story of [X] was told by [Y].",
        ),
        "facts": (
            "Hamlet=Shakespeare|William Shakespeare|William; "
            "Macbeth=Shakespeare|William Shakespeare|William; "
            "Oliver Twist=Dickens|Charles Dickens|Charles; "
            "David Copperfield=Dickens|Charles Dickens|Charles; "
            "Pride and Prejudice=Austen|Jane Austen|Jane; Emma=Austen|Jane Austen|Jane; "
            "Ulysses=Joyce|James Joyce|James; Animal Farm=Orwell|George Orwell|George; "
            "War and Peace=Tolstoy|Leo Tolstoy|Leo; Anna Karenina=Tolstoy|Leo Tolstoy|Leo; "
            "Crime and Punishment=Dostoevsky|Fyodor Dostoevsky|Fyodor; "
            "Don Quixote=Cervantes|Miguel de Cervantes|Miguel; "
            "Les Miserables=Hugo|Victor Hugo|Victor; The Hobbit=Tolkien|J.R.R. Tolkien; "
            "Dracula=Stoker|Bram Stoker|Bram; Frankenstein=Shelley|Mary Shelley|Mary; "
            "Moby Dick=Melville|Herman Melville|Herman; Faust=Goethe; "
            "The Trial=Kafka|Franz Kafka|Franz; The Odyssey=Homer; The Iliad=Homer; "
            "The Republic=Plato; The Divine Comedy=Dante; Candide=Voltaire; The Aeneid=Virgil; "
            "Lolita=Nabokov|Vladimir Nabokov|Vladimir; Walden=Thoreau|Henry David Thoreau|Henry; "
            "The Jungle Book=Kipling|Rudyard Kipling|Rudyard"
        ),
    },
    "composer": {
        "label": "composer of a work",
        "manual": (
            "The composer of [X] is [Y].",
            "[X] was composed by [Y].",
            "Who composed [X]? [Y].",
            "The music of [X] was written by [Y].",
            "[X] is a piece by [Y].",
        ),
        "auto": (
            "On the score of [X] stands the name [Y].",
            "In the concert hall, [X] reminds us of its maker, [Y].",
            "The notes of [X] came from [Y].",
            "Listeners of [X] hear the music of [Y].",
            "[X] was first put on paper by [Y].",
        ),
        "facts": (
            "The Magic Flute=Mozart|Wolfgang; Don Giovanni=Mozart|Wolfgang; "
            "The Marriage of Figaro=Mozart|Wolfgang; the Moonlight Sonata=Beethoven|Ludwig; "
            "Fidelio=Beethoven|Ludwig; the Eroica Symphony=Beethoven|Ludwig; "
            "the Brandenburg Concertos=Bach|Johann; the Goldberg Variations=Bach|Johann; "
            "the St Matthew Passion=Bach|Johann; The Four Seasons=Vivaldi|Antonio; "
            "Messiah=Handel|George; Water Music=Handel|George; The Creation=Haydn|Joseph; "
            "Swan Lake=Tchaikovsky|Pyotr; The Nutcracker=Tchaikovsky|Pyotr; Aida=Verdi|Giuseppe; "
            "Rigoletto=Verdi|Giuseppe; La Traviata=Verdi|Giuseppe; Tosca=Puccini|Giacomo; "
            "Turandot=Puccini|Giacomo; Carmen=Bizet|Georges; Bolero=Ravel|Maurice; "
            "La Mer=Debussy|Claude; Parsifal=Wagner|Richard; Tannhauser=Wagner|Richard; "
            "The Rite of Spring=Stravinsky|Igor; The Planets=Holst|Gustav; Finlandia=Sibelius|Jean"
        ),
    },
    "maker": {
        "label": "company that makes a product",
        "manual": (
            "The [X] is made by [Y].",
            "The company that makes the [X] is [Y].",
            "Which company makes the [X]? [Y].",
            "The [X] is a product of [Y].",
            "The maker of the [X] is [Y].",
        ),
        "auto": (
            "The [X] was brought to market by [Y].",
            "The logo on the [X] is that of [Y].",
            "Buyers of the [X] pay their money to [Y].",
            "The [X] was developed at [Y].",
            "The engineers of the [X] work for [Y].",
        ),
        "facts": (
            "iPhone=Apple; iPad=Apple; Macintosh=Apple; Windows system=Microsoft; Xbox=Microsoft; "
            "Excel program=Microsoft; PlayStation=Sony; Walkman=Sony; Game Boy=Nintendo; "
            "Wii=Nintendo; Android system=Google; Chrome browser=Google; Kindle=Amazon; "
            "Echo speaker=Amazon; Galaxy phone=Samsung; ThinkPad=Lenovo|IBM; "
            "Photoshop program=Adobe; Mustang car=Ford; Model T=Ford; Corolla=Toyota; "
            "Prius=Toyota; Civic=Honda; Beetle car=Volkswagen; Golf car=Volkswagen; "
            "Model S=Tesla; 747 jet=Boeing; A380 jet=Airbus; Pentium chip=Intel"
        ),
    },
    "profession": {
        "label": "what a person is famous as",
        "manual": (
            "[X] was a famous [Y].",
            "The profession of [X] was [Y].",
            "What was [X] by profession? A [Y].",
            "[X] worked as a [Y].",
            "[X] is remembered as a great [Y].",
        ),
        "auto": (
            "History books call [X] a [Y].",
            "[X] earned a living as a [Y].",
            "People admire [X] as a [Y].",
            "In short, [X] was a [Y].",
            "If you ask who [X] was, the answer is a [Y].",
        ),
        "facts": (
            "Albert Einstein=physicist|scientist; Isaac Newton=physicist|scientist|mathematician; "
            "Niels Bohr=physicist|scientist; Marie Curie=physicist|chemist|scientist; "
            "Pablo Picasso=painter|artist; Claude Monet=painter|artist; "
            "Vincent van Gogh=painter|artist; Rembrandt=painter|artist; "
            "Wolfgang Amadeus Mozart=composer|musician; Johann Sebastian Bach=composer|musician; "
            "Ludwig van Beethoven=composer|musician; Frederic Chopin=composer|pianist|musician; "
            "Plato=philosopher; Aristotle=philosopher; Immanuel Kant=philosopher; "
            "Socrates=philosopher; William Shakespeare=playwright|writer|poet; "
            "Charles Dickens=writer|novelist|author; Leo Tolstoy=writer|novelist|author; "
            "Jane Austen=writer|novelist|author; Emily Dickinson=poet|writer; "
            "Carl Friedrich Gauss=mathematician; Leonhard Euler=mathematician; "
            "Charles Darwin=biologist|naturalist|scientist; "
            "Louis Armstrong=musician|singer|trumpeter; Charlie Chaplin=actor|comedian; "
            "Pele=footballer|player; Muhammad Ali=boxer"
        ),
    },
    "element": {
        "label": "chemical element with a symbol",
        "manual": (
            "[X] is the chemical symbol of [Y].",
            "The chemical symbol [X] stands for [Y].",
            "Which element has the symbol [X]? [Y].",
            "In chemistry, [X] means [Y].",
            "The element with the symbol [X] is [Y].",
        ),
        "auto": (
            "In the periodic table, [X] marks [Y].",
            "A chemist who writes [X] thinks of [Y].",
            "In a formula, [X] is short for [Y].",
            "The letters [X] on a bottle in the laboratory tell of [Y].",
            "Among the elements, [X] is written for [Y].",
        ),
        "facts": (
            "H=hydrogen; He=helium; C=carbon; N=nitrogen; O=oxygen; Na=sodium; Mg=magnesium; "
            "Al=aluminium|aluminum; Si=silicon; P=phosphorus; S=sulfur|sulphur; Cl=chlorine; "
            "K=potassium; Ca=calcium; Fe=iron; Cu=copper; Zn=zinc; Ag=silver; Au=gold; "
            "Hg=mercury; Pb=lead; Sn=tin; U=uranium; I=iodine; Ne=neon; Ni=nickel; Li=lithium; "
            "Pt=platinum"
        ),
    },
    "animal": {
        "label": "class of an animal",
        "manual": (
            "A [X] is a kind of [Y].",
            "The [X] belongs to the animals called [Y].",
            "What kind of animal is a [X]? A [Y].",
            "In biology, the [X] is a [Y].",
            "Every [X] is a [Y].",
        ),
        "auto": (
            "Zoologists group the [X] with every other [Y].",
            "Children learn that the [X] is a [Y].",
            "If you see a [X], you see a [Y].",
            "The [X] has the body of a [Y].",
            "In the zoo, the sign at the [X] says [Y].",
        ),
        "facts": (
            "dog=mammal; whale=mammal; bat=mammal; horse=mammal; lion=mammal; eagle=bird; "
            "sparrow=bird; penguin=bird; owl=bird; parrot=bird; shark=fish; salmon=fish; "
            "trout=fish; tuna=fish; herring=fish; ant=insect; bee=insect; beetle=insect; "
            "butterfly=insect; mosquito=insect; cobra=snake|reptile; python=snake|reptile; "
            "crocodile=reptile; lizard=reptile; turtle=reptile; frog=amphibian; toad=amphibian; "
            "salamander=amphibian"
        ),
    },
    "opposite": {
        "label": "opposite of a word",
        "manual": (
            "The opposite of [X] is [Y].",
            "[X] is the opposite of [Y].",
            "What is the opposite of [X]? [Y].",
            "Something that is not [X] is [Y].",
            "The word [X] is the contrary of [Y].",
        ),
        "auto": (
            "If it is not [X], it must be [Y].",
            "First it was [X], now it is [Y].",
            "The reverse of [X] is [Y].",
            "One is [X], the other is [Y].",
            "Where one says [X], the other says [Y].",
        ),
        "facts": (
            "hot=cold; big=small|little; fast=slow; high=low; old=young|new; rich=poor; "
            "strong=weak; happy=sad|unhappy; light=dark|heavy; open=closed|shut; wet=dry; "
            "hard=soft|easy; full=empty; clean=dirty; early=late; near=far; thick=thin; "
            "wide=narrow; loud=quiet|silent; left=right; north=south; east=west; day=night; "
            "summer=winter; love=hate; war=peace; black=white; true=false"
        ),
    },
}


def facts():
    """Yield a row of the format "fact" (see fact_files.py) for each fact."""
    for relation, data in RELATIONS.items():
        for number, text in enumerate(data["facts"].split("; ")):
            subject, answers = text.split("=")
            yield {
                "uuid": f"{relation}-{number:02d}",
                "relation": relation,
                "relation_label": data["label"],
                "subject": subject.strip(),
                "answers": answers.strip().split("|"),
                "manual_templates": list(data["manual"]),
                "auto_templates": list(data["auto"]),
            }
